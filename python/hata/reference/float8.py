"""How keys and values lie in float8 caches."""

import torch
from torch import Tensor

MAX_FLOAT8 = 448.0  # the largest float8_e4m3fn


def as_rows(new: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """New keys or values ``[..., num_kv_heads, head_dim]`` as a cache of a dtype holds them."""
    if dtype != torch.float8_e4m3fn:
        return new
    return (new.float() / per_head(scale)).clamp(-MAX_FLOAT8, MAX_FLOAT8).to(dtype)


def per_head(scale: Tensor | None) -> Tensor | float:
    """A scale, or those of each KV head, as a factor of ``[..., num_kv_heads, head_dim]``."""
    return 1.0 if scale is None else scale.reshape(-1, 1)
