"""Whether codes are those of the keys beside which they lie, for `Settings.check`."""

import torch
from torch import Tensor

from hata import ops

_FLOAT8 = torch.finfo(torch.float8_e4m3fn)  # its largest number is what larger ones become


def first_wrong_code(keys: Tensor, codes: Tensor, key_weights: Tensor) -> int | None:
    """Returns the first position whose code is not that of its key; None if there is none.

    The code of a float8 key is that of the key before it was rounded, which is gone. Rounding moves
    an element by at most a 16th of itself, or of the smallest normal number, and a projection by at
    most that times the weights' magnitudes. A bit is compared where the rounded key's projection is
    further from 0, which most of them are: no right code is refused, and of a wrong one all bits
    that are compared would have to agree. A scale is a factor of all this.

    Args:
        keys: Cached keys, ``[seq_len, num_kv_heads, head_dim]``.
        codes: ``[seq_len, num_kv_heads, num_words]``, int32.
        key_weights: ``[num_kv_heads, head_dim, num_bits]``.
    """
    if keys.dtype == torch.float8_e4m3fn:
        rows, weights = keys.float(), key_weights.float()
        moved = (rows.abs() / 16).clamp_min(_FLOAT8.smallest_normal / 16)
        moved[rows.abs() == _FLOAT8.max] = torch.inf
        projections = torch.einsum("thd,hdn->thn", rows, weights)
        furthest = torch.einsum("thd,hdn->thn", moved, weights.abs())
        bits = codes[..., None] >> torch.arange(32, dtype=torch.int32, device=codes.device) & 1
        wrong = (projections.abs() > furthest) & ((projections > 0) != bits.flatten(-2).bool())
    else:
        wrong = codes != ops.hash_encode(keys[None], key_weights)[0].transpose(0, 1)
    positions = wrong.flatten(1).any(1).nonzero()
    return int(positions[0]) if len(positions) > 0 else None
