"""A cache whose keys and values lie in host memory, its codes on the GPU."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from hata import ops
from hata.cache import HataCache
from hata.checks import check, check_int
from hata.config import HataConfig
from hata.decode_buffers import DecodeBuffers
from hata.host_memory import HostMemory, release_host_memory
from hata.row_cache import RowCache
from hata.sequences import PagePool
from hata.storage import PageStorage
from hata.weights import HashWeights

__all__ = ["PAGE_SIZE", "OffloadedCache", "release_host_memory"]

# Positions of a page. A page's keys of one layer are what prompts that go on read at a stretch.
PAGE_SIZE = 64
# Taken at once, because taking waits for the device and the system.
BLOCK_BYTES = 256 << 20
# Rows of the row cache for each that a step selects.
SLOTS_PER_SELECTED = 4
MAX_SLOTS = 1 << 20  # of `hata.ops.fetch_rows`


class OffloadedCache(HataCache):
    """A `HataCache` for more tokens than the GPU has room for.

    Keys and values lie in host memory, page by page, and codes, norms, lengths and block tables on
    the GPU: with codes of 64 bits, 1.6 % of a token's bytes in 16-bit formats. Kernels write new
    rows to host memory and read those that they attend to from there, over PCIe. Memory is taken on
    demand, and a sequence that would need more than ``host_memory`` is refused before anything
    changes.

    The first ``config.num_dense_layers`` layers read everything in every step, so their keys and
    values stay on the GPU. Where ``config.min_sparse_len`` is None every length is decoded
    sparsely: a dense step would read as much as the sequence has, over PCIe.

    What a cache has taken is kept for the next one when it is deleted, and until
    `release_host_memory`.

    Where the device is the CPU, host memory is all there is. On a GPU pages of ``k_cache`` and
    ``v_cache`` that no sequence has had yet should not be touched: they may not be taken.
    `copy.deepcopy` is refused.

    Source: HATA, arXiv 2506.02572, table 3 (HATA-off, of which no code was published).

    Attributes:
        host_memory: Bytes of host memory that keys and values may take.
        row_cache: The `hata.row_cache.RowCache`; None where ``num_slots`` is 0.

    Args:
        weights: As `HataCache` takes them, like ``config``, ``batch``, ``max_seq_len``,
            ``num_pages``, ``dtype`` and ``device``.
        config: The budget; None is `HataConfig`'s defaults.
        batch: Sequences.
        max_seq_len: Positions that a sequence can have.
        host_memory: Bytes of host memory that keys and values may take, in all.
        page_size: Positions of a page, a power of two.
        num_pages: Pages that the sequences share; None gives every sequence enough for
            ``max_seq_len``. There are no more than fit into ``host_memory``.
        num_slots: Rows that the row cache keeps on the GPU for each layer, sequence and KV head, at
            least the largest budget of a layer; 0 is no row cache: every step reads what it selects
            over PCIe. None is four times that budget.
        dtype: Of queries, new keys and new values: float16, bfloat16 or (on the CPU) float32.
        device: Where the codes lie.
        kv_cache_dtype: Of the rows in host memory and in the row cache: ``dtype``, which None
            stands for, or float8_e4m3fn, with which as much memory holds twice as many positions.
        record_cuts: As `HataCache` takes it.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument breaks its rule.
        RuntimeError: The system refuses to reserve or to give host memory. So do the methods that
            make a sequence longer, which change nothing then.
    """

    def __init__(
        self,
        weights: HashWeights,
        config: HataConfig | None = None,
        *,
        batch: int,
        max_seq_len: int,
        host_memory: int,
        page_size: int = PAGE_SIZE,
        num_pages: int | None = None,
        num_slots: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_cache_dtype: torch.dtype | None = None,
        record_cuts: bool = False,
    ) -> None:
        where = type(self).__name__
        check_int(where, "host_memory", host_memory, 1)
        check_int(where, "page_size", page_size, 1)
        self.host_memory = host_memory
        super().__init__(
            weights,
            config,
            batch=batch,
            max_seq_len=max_seq_len,
            page_size=page_size,
            num_pages=num_pages,
            dtype=dtype,
            device=device,
            kv_cache_dtype=kv_cache_dtype,
            record_cuts=record_cuts,
        )
        if self.config.min_sparse_len is None:
            self.min_sparse_len = 0
        capacity = self.block_table.shape[1] * self.page_size
        sparse = self.layer_budgets[self.num_resident_layers :]
        budget = min(max(layer.top_k for layer in sparse), capacity)
        if num_slots is None:
            num_slots = min(SLOTS_PER_SELECTED * budget, capacity, MAX_SLOTS)
        check_int(where, "num_slots", num_slots, 0, MAX_SLOTS)
        rule = f"be 0 or at least {budget}, the positions that a step selects"
        check(num_slots == 0 or num_slots >= budget, where, "num_slots", rule, num_slots)
        self.row_cache: RowCache | None = None
        if num_slots > 0:
            self.row_cache = RowCache(
                self.k_cache[self.num_resident_layers :],
                batch=batch,
                num_slots=num_slots,
                device=self.device,
            )

    @property
    def num_resident_layers(self) -> int:
        """First layers whose keys and values stay on the GPU."""
        return min(self.config.num_dense_layers, self.num_layers)

    def _allocate(
        self, function: str, pool: PagePool | None, dtype: torch.dtype, device: torch.device
    ) -> tuple[PagePool | None, PageStorage]:
        assert pool is not None  # a page_size makes one
        num_layers, dense = self.num_layers - self.num_resident_layers, self.config.num_dense_layers
        rule = f"be below num_layers={self.num_layers}"
        check(num_layers > 0, function, "config.num_dense_layers", rule, dense)
        row_bytes = 2 * self.num_kv_heads * self.head_dim * dtype.itemsize
        page_bytes = num_layers * pool.page_size * row_bytes
        num_pages = min(pool.num_pages, self.host_memory // page_bytes)
        rule = f"hold a page of {pool.page_size} positions, which is {page_bytes} bytes"
        check(num_pages > 0, function, "host_memory", rule, self.host_memory)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        host = HostMemory(function, num_pages * page_bytes, device)

        def reserve(function: str, held: int) -> None:
            if held * page_bytes > host.num_taken:
                host.take(function, max(held * page_bytes, host.num_taken + BLOCK_BYTES))

        reserve(function, 1)
        limit = f", all that host_memory={self.host_memory} bytes hold"
        pool = PagePool(
            self.batch,
            num_pages,
            pool.page_size,
            reserve=reserve,
            limit=limit if num_pages < pool.num_pages else "",
        )
        return pool, PageStorage.allocate(
            self.weights,
            num_pages=num_pages,
            page_size=pool.page_size,
            dtype=dtype,
            device=device,
            host=host,
            selecting_layers=self.selecting_layers,
            num_resident_layers=self.num_resident_layers,
        )

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Cuts every sequence to a length, as `HataCache.truncate`."""
        super().truncate(lengths)
        self._forget()

    def reset(self) -> None:
        """Empties every sequence and takes back its pages, as `HataCache.reset`."""
        super().reset()
        self._forget()

    def _forget(self) -> None:
        """Drops cached rows of positions that no longer are."""
        if self.row_cache is not None:
            self.row_cache.forget(self.cache_seqlens)

    def _reordered(self, order: list[int], sources: list[int], copies: list[int]) -> None:
        if self.row_cache is not None:
            self.row_cache.reorder(*map(self._sequences.to_device, (order, sources, copies)))

    def _sparse_step(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        buffers: DecodeBuffers,
        softmax_scale: float,
        softcap: float | None,
    ) -> DecodeBuffers:
        layer = layer_idx - self.num_resident_layers
        if self.row_cache is None or layer < 0:
            return super()._sparse_step(layer_idx, q, k, v, buffers, softmax_scale, softcap)
        self._write(layer_idx, k, v, None)
        buffers = self._select(layer_idx, q, buffers)
        tables = (self.block_table, self.cache_seqlens)
        caches = (self.k_cache[layer_idx], self.v_cache[layer_idx], *tables)
        try:
            out, lse = self.row_cache.attend(
                layer,
                q,
                buffers.indices,
                *caches,
                softmax_scale=softmax_scale,
                softcap=softcap,
                k_scale=self.k_scale[layer_idx],
                v_scale=self.v_scale[layer_idx],
            )
        except BaseException:  # the new tokens are about to be taken back
            self.row_cache.forget(self.cache_seqlens - q.shape[1])
            raise
        return replace(buffers, out=out, lse=lse)

    def _select(self, layer_idx: int, q: Tensor, buffers: DecodeBuffers) -> DecodeBuffers:
        """Returns the buffers with what a layer selects, or what another has that it shares."""
        codes, query_bits = self.code_cache[layer_idx], self.weights.query_bits
        if codes is None:
            return self._buffers.shared(layer_idx, self._sequences.num_steps)
        query_weights = self.weights.layer(layer_idx, self.dtype, self.device)[1]
        indices, num_selected, *cut = ops.score_select(
            ops.encode_query(q, query_weights, query_bits=query_bits),
            codes,
            self.norm_cache[layer_idx],
            self.block_table,
            self.cache_seqlens,
            weight_sum=ops.plane_weight_sum(query_bits, q.shape[2] // self.num_kv_heads),
            **self.layer_budgets[layer_idx]._asdict(),
            num_sink=self.config.num_sink,
            num_recent=self.config.num_recent,
            return_cut=buffers.last_score is not None,
        )
        last_score, num_ties = cut or (None, None)
        return replace(
            buffers,
            indices=indices,
            num_selected=num_selected,
            last_score=last_score,
            num_ties=num_ties,
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Refuses: a copy would take as much host memory again."""
        raise ValueError("hata.OffloadedCache: the cache must not be copied, got copy.deepcopy")
