"""One layer's decoding step with keys and values in host memory, by where its rows come from.

Queries of neighbouring steps share a part: ``similarity`` is the cosine between two of them, and
sets how much of a selection the row cache already holds. The hit rate is what the row cache counted
in the steps that were timed. Each step runs through several layers, so that no row is in the L2.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typer import Option

import hata
from hata.commands.options import with_options
from hata.offload import OffloadedCache
from hata.provenance import origin

from .cases import MIN_TOP_K, PAPER_BUDGET, tokens
from .options import Output, check_output, checked_device
from .report import RESULTS, Report, Row, slug
from .timing import Timer, Timing, first_line
from .vllm import parsed

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama 3.1 8B
NUM_STEPS = 16  # of one graph, each with queries of its own
ROOM = 256  # positions of a sequence, for the steps
CASES = ((1, 32 << 10), (1, 128 << 10), (1, 512 << 10), (8, 32 << 10))
SIMILARITIES = (0.0, 0.5, 0.7, 0.9, 1.0)
MAX_LAYER_BYTES = 8 << 30  # of the host memory of a case
FILL_CHUNK = 64 << 10  # tokens
TRANSFER_BYTES = 1 << 28
BUDGET_S = {"cuda": 0.1, "cpu": 0.2}
# mode: what it is.
MODES = {
    "resident": "everything on the GPU: hata.decode_step",
    "mapped": "rows read over PCIe by hata.decode_step, no row cache",
    "row_cache": "rows fetched into the row cache",
    "dense": "every position read over PCIe",
}
COLUMNS = [
    "mode",
    "batch",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "seq_len",
    "layers",
    "top_k",
    "num_slots",
    "similarity",
]
COLUMNS += ["us", "spread_us", "hit_rate", "pcie_bytes", "pcie_floor_us", "pcie_gbps"]
SHOWN = {name: name.replace("_", " ") for name in COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """What the command line chose."""

    device: Annotated[
        str | None, Option(help="cpu or cuda; by default cuda where there is one.")
    ] = None
    case: Annotated[list[str], Option(help='"8x32768": sequences x tokens; may be repeated.')] = (
        field(default_factory=list)
    )


@with_options()
def measure_offload(options: Options) -> None:
    """Measures one layer's decoding step with keys and values in host memory."""
    device = checked_device(options.device)
    cases = [parsed(text) for text in options.case] or CASES
    path = options.output or RESULTS / f"offload_{slug(device)}.csv"
    check_output(path)
    words = [f"--case {text}" for text in options.case]
    command = " ".join([f"python -m bench offload --device {device.type}", *words])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    console = Console(stderr=True)
    timer = Timer(device, BUDGET_S[device.type])
    bytes_per_us = transfer_bytes_per_us(timer)
    common = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM}
    common["pcie_gbps"] = bytes_per_us / 1e3
    with Progress(console=console, transient=True) as progress, torch.no_grad():
        for batch, seq_len in progress.track(cases, description="cases"):
            row = common | {"batch": batch, "seq_len": seq_len}
            try:
                for measured in measure(timer, batch, seq_len):
                    floor = measured["pcie_bytes"] / bytes_per_us
                    report.add(row | measured | {"pcie_floor_us": floor})
            except (torch.OutOfMemoryError, RuntimeError) as error:
                where = f"{batch} x {tokens(seq_len)}"
                console.print(f"{where}: {first_line(error)}", highlight=False)
    report.show(Console(), SHOWN, "A layer's step, keys and values in host memory", "random data")
    print(f"{len(report.rows)} rows in {path}")


def transfer_bytes_per_us(timer: Timer) -> float:
    """Returns how fast pinned host memory is copied to the device."""
    on_gpu = timer.device.type == "cuda"
    source = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty_like(source, device=timer.device)
    return TRANSFER_BYTES / timer([lambda: target.copy_(source, non_blocking=True)]).us


def measure(timer: Timer, batch: int, seq_len: int) -> Iterator[Row]:
    """Yields the columns of every mode."""
    device = timer.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    top_k = max(MIN_TOP_K, round(seq_len * PAPER_BUDGET))
    row_bytes = 2 * HEAD_DIM * dtype.itemsize
    layer_bytes = batch * seq_len * NUM_KV_HEADS * row_bytes
    layers = max(2, min(8, MAX_LAYER_BYTES // layer_bytes))
    weights = hata.HashWeights.random(
        num_layers=layers, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM
    )
    config = hata.HataConfig(top_k=top_k, num_dense_layers=0, min_sparse_len=0)
    max_seq_len = seq_len + ROOM
    shape: dict[str, Any] = {"batch": batch, "max_seq_len": max_seq_len, "dtype": dtype}
    host_memory = 2 * layers * layer_bytes
    queries = torch.randn(2, NUM_STEPS, layers, batch, 1, NUM_HEADS, HEAD_DIM).to(device, dtype)
    new = torch.randn(2, batch, 1, NUM_KV_HEADS, HEAD_DIM).to(device, dtype)
    row: Row = {"layers": layers, "top_k": top_k, "pcie_bytes": 0}
    selected_bytes = batch * NUM_KV_HEADS * top_k * row_bytes

    cache = hata.HataCache(weights, config, page_size=64, device=device, **shape)
    fill(cache, seq_len)
    yield row | times(timed(timer, cache, queries[0], new)) | {"mode": "resident"}
    cache = OffloadedCache(weights, config, host_memory=host_memory, device=device, **shape)
    fill(cache, seq_len)
    rows, cache.row_cache = cache.row_cache, None
    assert rows is not None  # which num_slots makes
    step = times(timed(timer, cache, queries[0], new))
    yield row | step | {"mode": "mapped", "pcie_bytes": selected_bytes}
    dense = [partial(attend_densely, cache, i, queries[0, 0, i]) for i in range(layers)]
    yield row | times(timer(dense)) | {"mode": "dense", "pcie_bytes": layer_bytes, "top_k": None}
    cache.row_cache = rows
    for similarity in SIMILARITIES:
        shared, own = math.sqrt(similarity), math.sqrt(1 - similarity)
        mixed = shared * queries[0, :1] + own * queries[1]
        step = times(timed(timer, cache, mixed, new))
        missing = rows.num_missing.float().mean().item()
        yield (
            row
            | step
            | {
                "mode": "row_cache",
                "num_slots": rows.num_slots,
                "similarity": similarity,
                "hit_rate": 1 - missing / top_k,
                "pcie_bytes": round(missing * batch * NUM_KV_HEADS * row_bytes),
            }
        )


def times(timing: Timing) -> Row:
    return {"us": timing.us, "spread_us": timing.spread_us}


def fill(cache: hata.HataCache, seq_len: int) -> None:
    """Fills every sequence with random keys and values."""
    shape = (cache.batch, cache.num_kv_heads, cache.head_dim)
    for start in range(0, seq_len, FILL_CHUNK):
        q_len = min(FILL_CHUNK, seq_len - start)
        for layer_idx in range(cache.num_layers):
            k, v = (
                torch.randn(shape[0], q_len, *shape[1:], dtype=cache.dtype, device=cache.device)
                for _ in range(2)
            )
            cache.append(layer_idx, k, v)


def timed(timer: Timer, cache: hata.HataCache, queries: Tensor, new: Tensor) -> Timing:
    """Times a layer's step, over steps and layers; queries ``[steps, layers, batch, 1, ...]``."""
    calls: list[Callable[[], object]] = [
        partial(hata.decode_attention, q, *new, cache, layer_idx)
        for step in queries
        for layer_idx, q in enumerate(step)
    ]
    lengths = cache.seq_lens
    cache.extend(1)
    timing = timer(calls)
    cache.close_step()
    cache.truncate(lengths)
    return timing


def attend_densely(cache: hata.HataCache, layer_idx: int, q: Tensor) -> object:
    caches = (cache.k_cache[layer_idx], cache.v_cache[layer_idx])
    return hata.dense_attention(q, *caches, cache.block_table, cache.cache_seqlens)
