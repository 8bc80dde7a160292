"""The arguments of one decoding step, for the tests that run a whole one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cases import Caches, make_caches, poisoned, random_vectors
from hata import DecodeStepOutput, decode_step, reference


@dataclass(frozen=True)
class DecodeCase:
    """New tokens, weights, caches whose codes are those of their keys, and the settings."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_weights: Tensor
    query_weights: Tensor
    caches: Caches
    settings: dict[str, Any]

    def run(self, **buffers: Any) -> DecodeStepOutput:
        return decode_step(
            *(self.q, self.k, self.v, self.key_weights, self.query_weights),
            *self.caches.all,
            **self.settings,
            **buffers,
        )

    def cut_buffers(self) -> dict[str, Tensor]:
        """Where a step writes, if they are given to it, how its selections ended."""
        has_norms, pairs = self.caches.norm_cache is not None, self.k.shape[:-1]
        dtypes = {
            "last_score": torch.float16 if has_norms else torch.int32,
            "num_ties": torch.int32,
        }
        device = self.k.device.type
        return {name: poisoned(*pairs, dtype=t, device=device) for name, t in dtypes.items()}

    def clone(self, device: str | None = None) -> "DecodeCase":
        """The same tokens and weights, and a copy of the caches."""
        names = ("q", "k", "v", "key_weights", "query_weights")
        moved = {name: getattr(self, name).to(device) for name in names if device is not None}
        return replace(self, caches=self.caches.clone(device), **moved)


def make_decode_case(
    seq_lens: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype = torch.float16,
    q_len: int = 1,
    group: int = 3,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    num_bits: int = 64,
    page_size: int | None = 16,
    layout: str = "nhd",
    key_norms: bool = False,
    query_bits: int = 4,
    top_k: int = 16,
    num_sink: int = 2,
    num_recent: int = 4,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    draw: Callable[..., Tensor] = random_vectors,
) -> DecodeCase:
    """``draw`` makes the new tokens and the weights."""
    caches = make_caches(
        seq_lens,
        device=device,
        dtype=dtype,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_bits=num_bits,
        page_size=page_size,
        layout=layout,
        key_norms=key_norms,
    )
    batch = len(seq_lens)

    def vectors(*shape: int) -> Tensor:
        return draw(*shape, dtype=dtype, device=device)

    key_weights = vectors(num_kv_heads, head_dim, num_bits)
    codes, norms = reference.hash_encode(caches.k_cache, key_weights, key_norms=True)
    caches.code_cache.copy_(codes)
    if key_norms:
        caches.norm_cache.copy_(norms)
    return DecodeCase(
        vectors(batch, q_len, num_kv_heads * group, head_dim),
        vectors(batch, q_len, num_kv_heads, head_dim),
        vectors(batch, q_len, num_kv_heads, head_dim),
        key_weights,
        vectors(num_kv_heads, head_dim, num_bits),
        caches,
        {
            "query_bits": query_bits,
            "top_k": top_k,
            "num_sink": num_sink,
            "num_recent": num_recent,
            "top_k_share": top_k_share,
            "min_top_k": min_top_k,
        },
    )
