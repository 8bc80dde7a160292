"""Decoding steps in which the CPU reads the rows of host memory, beside those that the GPU reads.

Each is one layer's step in parts: on the GPU up to what the host needs, on the host, and on the GPU
again. What the GPU does is captured in CUDA graphs; the host waits for the first and launches the
others.
"""

import ctypes
import math
import statistics
import time
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from hata import ops
from hata.offload import OffloadedCache

from .timing import Call, Timing

MIN_REPEATS, MAX_REPEATS = 3, 15
STAGED_PIECES = 4  # a piece is copied to the GPU while the host gathers the next
MIN_HEAD_DIM = 64  # of rows on a GPU
ON_GPU = {"select", "meanwhile", "finish"}  # the parts that are captured


class HostStep:
    """One layer's step by the host's help; an open step of the cache is written by each call.

    Attributes:
        mode: Its name in the rows.
        overlaps: Whether `meanwhile` does anything.

    Args:
        cache: Keys and values in host memory; a step is open.
        num_heads: Query heads.
    """

    mode: ClassVar[str]
    overlaps: ClassVar[bool] = False

    def __init__(self, cache: OffloadedCache, num_heads: int) -> None:
        self.cache, self.group = cache, num_heads // cache.num_kv_heads
        self.rows = [
            (seen_by_cpu(k), seen_by_cpu(v))
            for k, v in zip(cache.k_cache, cache.v_cache, strict=True)
        ]
        self.tables = (cache.block_table.cpu(), cache.cache_seqlens.cpu())
        self.top_k = cache.layer_budgets[0].top_k
        shape = (cache.batch, 1, num_heads)
        self.q, self.out = (self.pinned(*shape, cache.head_dim) for _ in range(2))
        self.lse = self.pinned(*shape, dtype=torch.float32)
        self.out_on_gpu, self.lse_on_gpu = self.on_gpu(self.out), self.on_gpu(self.lse)

    def select(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """On the GPU: ends with the copies that the host waits for."""
        raise NotImplementedError

    def meanwhile(self, layer_idx: int, q: Tensor) -> None:
        """On the GPU, while the host works."""

    def on_host(self, layer_idx: int) -> None:
        """On the host."""
        raise NotImplementedError

    def finish(self, layer_idx: int, q: Tensor) -> Tensor:
        """On the GPU; returns ``[batch, 1, num_heads, head_dim]``."""
        raise NotImplementedError

    def afterwards(self, layer_idx: int) -> None:
        """Queues what the next token's step of this layer needs."""

    def columns(self) -> dict[str, object]:
        """Returns more columns of its row, after a run."""
        return {}

    def pinned(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Host memory that is copied without the host's waiting."""
        on_gpu = self.cache.device.type == "cuda"
        return torch.empty(shape, dtype=dtype or self.cache.dtype, pin_memory=on_gpu)

    def on_gpu(self, like: Tensor) -> Tensor:
        """Memory on the cache's device, zeros at first."""
        return torch.zeros_like(like, device=self.cache.device, pin_memory=False)

    def indices(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends a token and selects by the codes; ``[batch, 1, num_kv_heads, top_k]``."""
        cache, weights = self.cache, self.cache.weights
        key_weights, query_weights = weights.layer(layer_idx, cache.dtype, cache.device)
        codes = (cache.code_cache[layer_idx], cache.norm_cache[layer_idx])
        tables = (cache.block_table, cache.cache_seqlens)
        rows = (cache.k_cache[layer_idx], cache.v_cache[layer_idx])
        ops.cache_append(k, v, key_weights, *rows, *codes, *tables)
        return ops.score_select(
            ops.encode_query(q, query_weights, query_bits=weights.query_bits),
            *(*codes, *tables),
            weight_sum=ops.plane_weight_sum(weights.query_bits, self.group),
            **cache.layer_budgets[layer_idx]._asdict(),
            num_sink=cache.config.num_sink,
            num_recent=cache.config.num_recent,
        )[0]

    def attend(self, layer_idx: int, q: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Attends to positions on the CPU."""
        return ops.gather_attention(q, *self.rows[layer_idx], *self.tables, indices)

    def bring_back(self) -> tuple[Tensor, Tensor]:
        """Copies ``out`` and ``lse`` to the GPU."""
        self.out_on_gpu.copy_(self.out, non_blocking=True)
        self.lse_on_gpu.copy_(self.lse, non_blocking=True)
        return self.out_on_gpu, self.lse_on_gpu


class OnCpu(HostStep):
    """The CPU attends to all that the GPU selects."""

    mode = "cpu"

    def __init__(self, cache: OffloadedCache, num_heads: int) -> None:
        super().__init__(cache, num_heads)
        shape = (cache.batch, 1, cache.num_kv_heads, self.top_k)
        self.positions = self.pinned(*shape, dtype=torch.int32)

    def select(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Sends queries and positions."""
        self.positions.copy_(self.indices(layer_idx, q, k, v), non_blocking=True)
        self.q.copy_(q, non_blocking=True)

    def on_host(self, layer_idx: int) -> None:
        """Attends to them."""
        out, lse = self.attend(layer_idx, self.q, self.positions)
        self.out.copy_(out)
        self.lse.copy_(lse)

    def finish(self, layer_idx: int, q: Tensor) -> Tensor:
        """Takes the result."""
        return self.bring_back()[0]


class Hybrid(OnCpu):
    """The GPU attends to the rows in its row cache, the CPU to those that it lacks.

    Merged by lse. The missing rows follow into the row cache behind the step, on a side stream. As
    `hata.ops.fetch_rows` looks up and copies at once, it is called twice, with states that are
    equal: in the step with one row in place of all, and behind it with the rows.
    """

    mode = "hybrid"
    overlaps = True

    def __init__(self, cache: OffloadedCache, num_heads: int, num_slots: int) -> None:
        super().__init__(cache, num_heads)
        device, batch, num_kv_heads = cache.device, cache.batch, cache.num_kv_heads
        shape = (batch, num_slots, num_kv_heads)

        def state() -> tuple[Tensor, ...]:
            places = torch.zeros(
                cache.num_pages, num_kv_heads, cache.page_size, dtype=torch.int32, device=device
            )
            slots = torch.full((batch, num_kv_heads, num_slots), -1, dtype=torch.int32).to(device)
            hand = torch.zeros(batch, num_kv_heads, dtype=torch.int32, device=device)
            return places, slots, torch.zeros_like(slots, dtype=torch.uint8), hand

        def rows(head_dim: int) -> Tensor:
            return torch.zeros(*shape, head_dim, dtype=cache.dtype, device=device)

        layers = range(cache.num_layers)
        self.states = [(state(), state()) for _ in layers]
        self.row_cache = [(rows(cache.head_dim), rows(cache.head_dim)) for _ in layers]
        self.no_rows = (rows(MIN_HEAD_DIM), rows(MIN_HEAD_DIM))
        one_row = torch.zeros(MIN_HEAD_DIM, dtype=cache.dtype, device=device)
        self.one_row = one_row.expand(*cache.k_cache[0].shape[:-1], MIN_HEAD_DIM)
        self.selected = [self.on_gpu(self.positions) for _ in layers]
        self.num_missing = torch.zeros(
            cache.num_layers, batch, num_kv_heads, dtype=torch.int32, device=device
        )
        self.slot_tables = (
            torch.arange(batch, dtype=torch.int32, device=device)[:, None],
            torch.full((batch,), num_slots, dtype=torch.int32, device=device),
        )
        on_gpu = device.type == "cuda"
        self.side = torch.cuda.Stream(device) if on_gpu else None
        self.filled = [torch.cuda.Event() for _ in layers] if on_gpu else []

    def select(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Sends queries and those positions whose rows the row cache lacks."""
        indices = self.selected[layer_idx]
        indices.copy_(self.indices(layer_idx, q, k, v))
        fetched = self.fetch(layer_idx, 0, (self.one_row, self.one_row), self.no_rows)
        # The one place behind a list takes all that is not to be taken.
        missing = torch.where(fetched.missing < 0, self.top_k, fetched.missing).long()
        self.positions.copy_(pad(indices, (0, 1), value=-1).gather(-1, missing), non_blocking=True)
        self.q.copy_(q, non_blocking=True)
        self.hits = pad(fetched.slots, (0, 1)).scatter(-1, missing, -1)
        self.hits[..., -1] = -1

    def meanwhile(self, layer_idx: int, q: Tensor) -> None:
        """Attends to the rows in the row cache."""
        rows = self.row_cache[layer_idx]
        self.cached = ops.gather_attention(q, *rows, *self.slot_tables, self.hits)

    def finish(self, layer_idx: int, q: Tensor) -> Tensor:
        """Merges both."""
        return ops.merge_attention_states(*self.bring_back(), *self.cached)[0]

    def afterwards(self, layer_idx: int) -> None:
        """Has the missing rows fetched; the next layer's step waits until its own are there."""
        rows = (self.cache.k_cache[layer_idx], self.cache.v_cache[layer_idx])
        with torch.cuda.stream(self.side):
            self.fetch(layer_idx, 1, rows, self.row_cache[layer_idx])
        if self.side is not None:
            self.filled[layer_idx].record(self.side)
            torch.cuda.current_stream().wait_event(self.filled[(layer_idx + 1) % len(self.filled)])

    def fetch(
        self, layer_idx: int, state: int, source: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor]
    ) -> ops.FetchedRows:
        tables = (self.cache.block_table, self.cache.cache_seqlens)
        return ops.fetch_rows(
            *(self.selected[layer_idx], *source, *tables, *to, *self.states[layer_idx][state]),
            num_missing=self.num_missing[layer_idx],
        )


class Staged(HostStep):
    """The host gathers the selected rows into one piece of pinned memory, which is copied."""

    mode = "staged"

    def __init__(self, cache: OffloadedCache, num_heads: int) -> None:
        super().__init__(cache, num_heads)
        batch, num_kv_heads, device = cache.batch, cache.num_kv_heads, cache.device
        row = 2 * cache.head_dim  # a position's key and its value lie side by side
        self.numbers = self.pinned(batch * num_kv_heads * self.top_k, dtype=torch.int32)
        self.staged = self.pinned(self.numbers.numel(), row)
        self.staged_on_gpu = self.on_gpu(self.staged)
        lists = self.staged_on_gpu.view(batch, num_kv_heads, self.top_k, 2, cache.head_dim)
        self.staged_rows = lists.transpose(1, 2).unbind(3)
        self.staged_tables = (
            torch.arange(batch, dtype=torch.int32, device=device)[:, None],
            torch.full((batch,), self.top_k, dtype=torch.int32, device=device),
        )
        everything = torch.arange(self.top_k, dtype=torch.int32, device=device)
        self.all_staged = everything.expand(batch, 1, num_kv_heads, -1).contiguous()
        strides = (stride // row for stride in cache.k_cache[0].stride()[:3])
        self.page_rows, self.position_rows, self.head_rows = strides
        self.flat_rows = []
        for k, _ in self.rows:
            size = (k.untyped_storage().nbytes() // k.element_size() - k.storage_offset()) // row
            self.flat_rows.append(k.as_strided((size, row), (row, 1)))

    def select(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Sends the numbers of the rows in host memory."""
        indices, page_size = self.indices(layer_idx, q, k, v)[:, 0], self.cache.page_size
        pages = self.cache.block_table[:, None].expand(-1, indices.shape[1], -1)
        page = pages.gather(2, (indices // page_size).long())
        head = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)[:, None]
        numbers = page * self.page_rows + indices % page_size * self.position_rows
        numbers += head * self.head_rows
        self.numbers.copy_(numbers.flatten(), non_blocking=True)

    def on_host(self, layer_idx: int) -> None:
        """Gathers the rows, and copies each piece as it is there."""
        pieces = (t.chunk(STAGED_PIECES) for t in (self.numbers, self.staged, self.staged_on_gpu))
        for numbers, staged, on_gpu in zip(*pieces, strict=True):
            torch.index_select(self.flat_rows[layer_idx], 0, numbers, out=staged)
            on_gpu.copy_(staged, non_blocking=True)

    def columns(self) -> dict[str, object]:
        """Counts the rows that are copied."""
        return {"pcie_bytes": self.staged.nbytes}

    def finish(self, layer_idx: int, q: Tensor) -> Tensor:
        """Attends to them."""
        return ops.gather_attention(q, *self.staged_rows, *self.staged_tables, self.all_staged)[0]


def seen_by_cpu(rows: Tensor) -> Tensor:
    """Returns a CPU tensor of the same memory, which lies in host memory."""
    storage = rows.untyped_storage()
    data = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(data, dtype=rows.dtype)
    return flat.as_strided(rows.shape, rows.stride(), rows.storage_offset())


def parts_of(step: HostStep, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Returns a call's parts by name, in order."""
    parts: dict[str, Call] = {"select": partial(step.select, layer_idx, q, k, v)}
    if step.overlaps:
        parts["meanwhile"] = partial(step.meanwhile, layer_idx, q)
    parts["on_host"] = partial(step.on_host, layer_idx)
    parts["finish"] = partial(step.finish, layer_idx, q)
    parts["afterwards"] = partial(step.afterwards, layer_idx)
    return parts


class Runner:
    """Runs calls of a step, one after the other.

    Args:
        step: The step.
        calls: Layer, query, key and value of each call.
    """

    def __init__(self, step: HostStep, calls: list[tuple[int, Tensor, Tensor, Tensor]]) -> None:
        self.calls = [parts_of(step, *call) for call in calls]
        self.on_gpu = step.cache.device.type == "cuda"
        self.run()  # warms up, and fills a row cache
        if self.on_gpu:
            self._capture()
            self.run()

    def run(self) -> None:
        """Runs all calls, and waits for the last one."""
        selected = torch.cuda.Event() if self.on_gpu else None
        for parts in self.calls:
            for name, part in parts.items():
                if name == "on_host" and selected is not None:
                    selected.synchronize()
                part()
                if name == "select" and selected is not None:
                    selected.record()
        if self.on_gpu:
            torch.cuda.synchronize()

    def timed(self, budget_s: float) -> Timing:
        """Returns the time of one call."""
        samples = [self._run_us()]
        repeats = math.ceil(1e6 * budget_s / (samples[0] * len(self.calls)))
        for _ in range(max(MIN_REPEATS, min(MAX_REPEATS, repeats)) - 1):
            samples.append(self._run_us())
        quartiles = statistics.quantiles(samples, n=4)
        return Timing(statistics.median(samples), quartiles[2] - quartiles[0])

    def _run_us(self) -> float:
        start = time.perf_counter()
        self.run()
        return (time.perf_counter() - start) * 1e6 / len(self.calls)

    def _capture(self) -> None:
        """Puts graphs in the place of the parts on the GPU; they share their memory."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for parts in self.calls:
            for name in [name for name in parts if name in ON_GPU]:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.stream(stream):
                    graph.capture_begin(pool=pool)
                    parts[name]()
                    graph.capture_end()
                parts[name] = graph.replay
