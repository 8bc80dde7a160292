"""Inputs worth testing with: random codes and caches in every layout, poisoned outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
LAYOUTS = ("nhd", "hnd", "slice")


@dataclass(frozen=True)
class Caches:
    """The caches of one layer, as the operators take them."""

    k_cache: Tensor
    v_cache: Tensor
    code_cache: Tensor
    norm_cache: Tensor | None
    block_table: Tensor
    cache_seqlens: Tensor

    @property
    def capacity(self) -> int:
        return self.block_table.shape[1] * self.k_cache.shape[1]

    @property
    def kv(self) -> tuple[Tensor, ...]:
        return self.k_cache, self.v_cache, self.block_table, self.cache_seqlens

    @property
    def codes(self) -> tuple[Tensor | None, ...]:
        return self.code_cache, self.norm_cache, self.block_table, self.cache_seqlens

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        return self.k_cache, self.v_cache, *self.codes

    def clone(self, device: str | None = None) -> "Caches":
        """A copy whose tensors have the same strides and whose gaps hold the same bytes."""
        norms = None if self.norm_cache is None else copy_storage(self.norm_cache, device)
        return Caches(
            copy_storage(self.k_cache, device),
            copy_storage(self.v_cache, device),
            copy_storage(self.code_cache, device),
            norms,
            copy_storage(self.block_table, device),
            copy_storage(self.cache_seqlens, device),
        )

    def double(self) -> "Caches":
        return replace(self, k_cache=self.k_cache.double(), v_cache=self.v_cache.double())


def make_caches(
    seq_lens: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype = torch.float16,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    num_bits: int = 64,
    page_size: int | None = 16,
    layout: str = "nhd",
    key_norms: bool = False,
) -> Caches:
    """Random caches: every row that no sequence uses holds NaN, pages lie in random order.

    ``page_size=None`` makes a contiguous cache of as many positions as the longest sequence has,
    and three more. Layouts: ``nhd`` is dense, ``hnd`` head-major, ``slice`` a part of longer rows.
    """
    batch = len(seq_lens)
    if page_size is None:
        page_size, max_pages = max(seq_lens) + 3, 1
    else:
        max_pages = max(1, max(-(-n // page_size) for n in seq_lens))
    num_pages = batch * max_pages + 2
    block_table = torch.randperm(num_pages)[: batch * max_pages].view(batch, max_pages).int()
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for b, seq_len in enumerate(seq_lens):
        t = torch.arange(seq_len)
        used[block_table[b, t // page_size], t % page_size] = True
        # What lies behind a sequence's last page is nobody's business.
        block_table[b, max(1, -(-seq_len // page_size)) :] = INT32_MAX

    gap = 5 if layout == "slice" else 0
    rows = (num_pages, page_size + gap, num_kv_heads, head_dim)

    def kv() -> Tensor:
        cache = torch.randn(rows)
        cache[:, :page_size][~used] = torch.nan
        cache[:, page_size:] = torch.nan
        cache = cache.to(dtype)
        if layout == "hnd":
            cache = cache.transpose(1, 2).contiguous().to(device).transpose(1, 2)
        return cache.to(device)[:, :page_size]

    norms = torch.rand(num_pages, num_kv_heads, page_size + gap).add(0.5).half().to(device)
    codes = random_codes(num_pages, num_kv_heads, page_size + gap, num_bits // 32, device=device)
    return Caches(
        kv(),
        kv(),
        codes[:, :, :page_size],
        norms[:, :, :page_size] if key_norms else None,
        block_table.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
    )


def row_cache(caches: Caches, num_slots: int) -> dict[str, Tensor]:
    """An empty row cache of these caches, as `fetch_rows` takes it; its rows hold NaN."""
    num_pages, page_size, num_kv_heads, head_dim = caches.k_cache.shape
    batch, device = caches.cache_seqlens.shape[0], caches.k_cache.device
    rows, pairs = (batch, num_slots, num_kv_heads, head_dim), (batch, num_kv_heads)
    int32 = {"dtype": torch.int32, "device": device}
    return {
        "k_rows": caches.k_cache.new_full(rows, torch.nan),
        "v_rows": caches.k_cache.new_full(rows, torch.nan),
        "slot_of_row": torch.zeros(num_pages, num_kv_heads, page_size, **int32),
        "position_of_slot": torch.full((*pairs, num_slots), -1, **int32),
        "referenced": torch.zeros((*pairs, num_slots), dtype=torch.uint8, device=device),
        "hand": torch.zeros(pairs, **int32),
    }


def random_codes(*shape: int, device: str) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32).to(device)


def random_planes(
    batch: int, q_len: int, num_kv_heads: int, weight_sum: int, num_bits: int, *, device: str
) -> Tensor:
    shape = (batch, q_len, num_kv_heads, weight_sum.bit_length(), num_bits // 32)
    return random_codes(*shape, device=device)


def random_indices(
    seq_lens: Sequence[int], q_len: int, num_kv_heads: int, top_k: int, *, device: str
) -> Tensor:
    """Visible positions in random order, none twice, among -1 wherever there are too few."""
    indices = torch.full((len(seq_lens), q_len, num_kv_heads, top_k), -1, dtype=torch.int32)
    for b, seq_len in enumerate(seq_lens):
        for j in range(q_len):
            visible = max(seq_len - q_len + j + 1, 0)
            for h in range(num_kv_heads):
                row = torch.cat([torch.randperm(visible)[:top_k], torch.full((top_k,), -1)])[:top_k]
                indices[b, j, h] = row[torch.randperm(top_k)]
    return indices.to(device)


def random_vectors(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(device)


def integer_vectors(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Small integers: their projections are exact, so that codes must equal the reference's."""
    return torch.randint(-3, 4, shape).to(dtype).to(device)


def strided(t: Tensor) -> Tensor:
    """The same values inside a wider tensor of NaN; the last dimension stays contiguous."""
    wide = t.new_full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 16), torch.nan)
    inner = wide[..., 1:-2, :-16]
    inner.copy_(t)
    return inner


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """An output buffer whose contents no operator would write."""
    value = torch.nan if dtype.is_floating_point else 119 if dtype == torch.uint8 else -77777
    return torch.full(shape, value, dtype=dtype, device=device)


def storage_of(t: Tensor) -> Tensor:
    """All that t's storage holds, as one dimension of t's dtype."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def copy_storage(t: Tensor, device: str | None = None) -> Tensor:
    """A copy of t and of everything else in its storage."""
    flat = storage_of(t).to(device or t.device, copy=True)
    return flat.as_strided(t.shape, t.stride(), t.storage_offset())
