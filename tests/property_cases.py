"""Random shapes and settings for hypothesis: everything that the operators accept, mostly small."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from cases import LAYOUTS, Caches, make_caches
from devices import DTYPES, HEAD_DIMS

PAGE_SIZES = [None, 1, 2, 4, 8, 16, 32, 64]  # None: contiguous, of any size
SHARES = st.none() | st.sampled_from([1 / 64, 0.1, 0.5]) | st.floats(1e-12, 1, exclude_max=True)
GROUPS = st.one_of(st.integers(1, 16), st.sampled_from([17, 20, 33, 48]))


@dataclass(frozen=True)
class Shape:
    """What hypothesis draws, shrinks and prints; tensors follow from it and from its seed."""

    device: str
    dtype: torch.dtype
    seq_lens: list[int]
    q_len: int
    num_kv_heads: int
    group: int
    head_dim: int
    num_bits: int
    page_size: int | None
    layout: str
    key_norms: bool
    query_bits: int
    top_k: int
    num_sink: int
    num_recent: int
    top_k_share: float | None
    min_top_k: int | None
    seed: int

    @property
    def batch(self) -> int:
        return len(self.seq_lens)

    @property
    def budget(self) -> dict[str, Any]:
        names = ("top_k", "num_sink", "num_recent", "top_k_share", "min_top_k")
        return {name: getattr(self, name) for name in names}

    @property
    def cache_shape(self) -> dict[str, Any]:
        names = ("num_kv_heads", "head_dim", "num_bits", "page_size", "layout", "key_norms")
        return {name: getattr(self, name) for name in ("device", "dtype", *names)}

    def caches(self) -> Caches:
        torch.manual_seed(self.seed)
        return make_caches(self.seq_lens, **self.cache_shape)


@st.composite
def shapes(draw: st.DrawFn, device: str) -> Shape:
    seq_lens = draw(
        st.lists(st.one_of(st.integers(0, 2), st.integers(0, 150)), min_size=1, max_size=4)
    )
    longest = max(seq_lens)
    around = st.integers(max(longest - 2, 1), longest + 3)
    top_k = draw(st.one_of(st.integers(1, 20), around, st.integers(1, 2 * longest + 70)))
    num_sink = draw(st.integers(0, min(top_k, 8)))
    num_recent = draw(st.integers(0, min(top_k - num_sink, 20)))
    share, least = draw(SHARES), None
    if share is not None:
        least = draw(st.none() | st.integers(max(1, num_sink + num_recent), top_k))
    return Shape(
        device=device,
        dtype=draw(st.sampled_from(DTYPES[device])),
        seq_lens=seq_lens,
        q_len=draw(st.integers(1, 8)),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(GROUPS),
        head_dim=draw(st.sampled_from(HEAD_DIMS[device])),
        num_bits=draw(st.sampled_from(range(32, 257, 32))),
        page_size=draw(st.sampled_from(PAGE_SIZES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        key_norms=draw(st.booleans()),
        query_bits=draw(st.integers(1, 4)),
        top_k=top_k,
        num_sink=num_sink,
        num_recent=num_recent,
        top_k_share=share,
        min_top_k=least,
        seed=draw(st.integers(0, 2**16)),
    )
