"""How bits lie in words, and projections become small integers and those bit planes."""

import torch
from torch import Tensor


def quantize(z: Tensor, weight_sum: int) -> Tensor:
    """Levels 0..weight_sum of ``[..., num_bits]`` projections; every step rounds to float32."""
    z = z.float()
    largest = z.abs().amax(-1, keepdim=True)
    x = z / largest.expand_as(z) * weight_sum
    x = torch.where(largest == 0, 1.0, x)  # c = +1
    return ((x + weight_sum) * 0.5 + 0.5).floor().clamp(0, weight_sum).long()


def unpack_bits(codes: Tensor) -> Tensor:
    """``[..., num_words]`` int32 to ``[..., num_words * 32]`` of 0 and 1, lowest bit first."""
    return ((codes.unsqueeze(-1) >> torch.arange(32, device=codes.device)) & 1).flatten(-2)


def pack_bits(bits: Tensor) -> Tensor:
    """``[..., num_bits]`` of 0 and 1 to ``[..., num_bits // 32]`` int32, lowest bit first."""
    words = bits.unflatten(-1, (-1, 32)).long() << torch.arange(32, device=bits.device)
    return words.sum(-1).to(torch.int32)  # keeps the low 32 bits


def plane_weights(weight_sum: int) -> list[int]:
    """1, 2, 4, ... and a last weight that brings their sum to weight_sum."""
    powers = [2**p for p in range(weight_sum.bit_length() - 1)]
    return [*powers, weight_sum - sum(powers)]


def pack_planes(level: Tensor, weight_sum: int) -> Tensor:
    """``[..., num_bits]`` levels to ``[..., num_planes, num_words]``, the last plane set first."""
    *powers, last = plane_weights(weight_sum)
    rest = torch.where(level >= last, level - last, level)
    planes = [(rest // power) % 2 for power in powers]
    return torch.stack([pack_bits(plane) for plane in [*planes, level >= last]], -2)


def unpack_planes(planes: Tensor, weight_sum: int) -> Tensor:
    """``[..., num_planes, num_words]`` to the integer vector c, ``[..., num_bits]``."""
    signs = 2 * unpack_bits(planes) - 1  # [..., num_planes, num_bits]
    weights = torch.tensor(plane_weights(weight_sum), device=planes.device)
    return (signs * weights[:, None]).sum(-2)
