"""merge_attention_states: attention over two sets of keys from each one's."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges the attention over two disjoint sets of keys into that over both.

    ``lse = ln(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a - lse) out_a + exp(lse_b - lse)
    out_b`` (the online softmax of arXiv 1805.02867). A state with ``lse = -infinity`` is empty and
    its ``out`` does not count; two empty states give ``out = 0`` and ``lse = -infinity``.

    Args:
        out_a: ``[batch, q_len, num_heads, head_dim]``, float16, bfloat16 or float32, contiguous.
        lse_a: ``[batch, q_len, num_heads]``, float32, natural logarithm, contiguous.
        out_b: Like ``out_a``.
        lse_b: Like ``lse_a``.

    Returns:
        ``out`` like ``out_a`` and ``lse`` like ``lse_a``.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride or device is not as above.
    """
    return torch.ops.hata.merge_attention_states.default(out_a, lse_a, out_b, lse_b)


@torch.library.register_fake("hata::merge_attention_states")
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a)
