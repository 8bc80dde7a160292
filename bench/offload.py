"""One layer's decoding step with keys and values in host memory, by where its rows come from.

Queries of neighbouring steps share a part: ``similarity`` is the cosine between two of them, and
sets how much of a selection the row cache already holds. The hit rate is what the row cache counted
in the steps that were timed. Each step runs through several layers, so that no row is in the L2.

Steps that need the host are timed by the host's clock, the others by the GPU's. ``tokens_per_s`` is
what a model of 32 such layers would decode on a GPU: its layers' steps and their matrix products,
measured alone (``linear_us``), and the head's. Norms, rotary embedding and residuals are left out.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typer import Option

import hata
from hata.checks import check
from hata.commands.options import with_options
from hata.offload import OffloadedCache
from hata.provenance import origin

from .cases import MIN_TOP_K, PAPER_BUDGET, tokens
from .host_steps import HostStep, Hybrid, OnCpu, Runner, Staged
from .magicpig import MagicPig
from .options import Output, check_output, checked_device, checked_names, repeated
from .report import RESULTS, Report, Row, slug
from .timing import Call, Timer, Timing, first_line
from .vllm import parsed

# Llama 3.1 8B.
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS = 32, 8, 128, 32
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
NUM_STEPS = 16  # of one graph, each with queries of its own
ROOM = 256  # positions of a sequence, for the steps
CASES = ((1, 32 << 10), (1, 128 << 10), (1, 512 << 10), (8, 32 << 10))
SIMILARITIES = (0.0, 0.7, 0.8, 0.87, 0.9, 1.0)  # at 0.87 a row cache hits as in SmolLM2
MAX_LAYER_BYTES = 8 << 30  # of the host memory of a case
FILL_CHUNK = 64 << 10  # tokens of all sequences
TRANSFER_BYTES = 1 << 28
BUDGET_S = {"cuda": 0.1, "cpu": 0.2}
# mode: what it is.
MODES = {
    "resident": "everything on the GPU: hata.decode_step",
    "resident_dense": "everything on the GPU, every position read",
    "mapped": "rows read over PCIe by hata.decode_step, no row cache",
    "dense": "every position read over PCIe",
    "row_cache": "rows fetched into the row cache",
    "cpu": "the CPU attends to the selected rows",
    "staged": "the CPU gathers the selected rows, one copy brings them",
    "hybrid": "the CPU attends to the rows that the row cache lacks, and they follow behind",
    "magicpig": "MagicPIG: hash tables and attention on the CPU",
}
WITH_HOST = ("cpu", "staged", "hybrid", "magicpig")
HOST_STEPS: tuple[type[HostStep], ...] = (OnCpu, Staged, MagicPig)
COLUMNS = [
    "mode",
    "batch",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "seq_len",
    "layers",
    "top_k",
    "kv_cache_dtype",
    "num_slots",
    "similarity",
]
COLUMNS += ["us", "spread_us", "hit_rate", "retrieved", "pcie_bytes", "pcie_floor_us"]
COLUMNS += ["pcie_gbps", "linear_us", "tokens_per_s"]
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
    mode: Annotated[
        list[str], Option(help=f"{', '.join(MODES)}; may be repeated. By default all.")
    ] = field(default_factory=list)
    kv_cache_dtype: Annotated[
        str | None,
        Option(help="float8_e4m3fn: keys and values in float8, where the GPU reads them."),
    ] = None


@with_options()
def measure_offload(options: Options) -> None:
    """Measures one layer's decoding step with keys and values in host memory."""
    device = checked_device(options.device)
    cases = [parsed(text) for text in options.case] or CASES
    float8, rule = options.kv_cache_dtype, "be float8_e4m3fn"
    check(float8 in (None, "float8_e4m3fn"), "bench", "--kv-cache-dtype", rule, float8)
    known = [mode for mode in MODES if not float8 or mode not in WITH_HOST]
    modes = checked_names("--mode", options.mode, known, known)
    path = options.output or RESULTS / f"offload_{slug(device)}.csv"
    check_output(path)
    words = [*repeated("--case", options.case), *repeated("--mode", options.mode)]
    words += [f"--kv-cache-dtype {float8}"] if float8 else []
    command = " ".join([f"python -m bench offload --device {device.type}", *words])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    console = Console(stderr=True)
    timer = Timer(device, BUDGET_S[device.type])
    bytes_per_us = transfer_bytes_per_us(timer)
    common = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM}
    common["pcie_gbps"] = bytes_per_us / 1e3
    with Progress(console=console, transient=True) as progress, torch.no_grad():
        for batch, seq_len in progress.track(cases, description="cases"):
            products = products_us(timer, batch) if device.type == "cuda" else None
            row = common | {"batch": batch, "seq_len": seq_len}
            try:
                for measured in measure(timer, batch, seq_len, modes, float8):
                    measured["pcie_floor_us"] = measured["pcie_bytes"] / bytes_per_us
                    if products is not None:
                        measured["linear_us"], head_us = products
                        layer_us = measured["us"] + measured["linear_us"]
                        token_us = NUM_LAYERS * layer_us + head_us
                        measured["tokens_per_s"] = 1e6 * batch / token_us
                    report.add(row | measured)
            except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
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


def products_us(timer: Timer, batch: int) -> tuple[float, float]:
    """Returns the time of a layer's matrix products, and of the head's, on a GPU."""
    heads, kv = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    layer = [(HIDDEN, heads + 2 * kv), (heads, HIDDEN)]  # queries, keys and values; output
    layer += [(HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
    times = []
    for shapes in (layer, [(HIDDEN, VOCABULARY)]):
        place: dict[str, Any] = {"dtype": torch.bfloat16, "device": timer.device}
        weights = [torch.randn(shape, **place) for shape in shapes]
        inputs = [torch.randn(batch, weight.shape[0], **place) for weight in weights]

        def multiply(inputs: list[Tensor] = inputs, weights: list[Tensor] = weights) -> None:
            for x, w in zip(inputs, weights, strict=True):
                x @ w

        times.append(timer([multiply]).us)
    return times[0], times[1]


def measure(
    timer: Timer, batch: int, seq_len: int, modes: Sequence[str], float8: str | None
) -> Iterator[Row]:
    """Yields the columns of every mode, and similarity where it matters."""
    device = timer.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    top_k = max(MIN_TOP_K, round(seq_len * PAPER_BUDGET))
    kv_cache_dtype = torch.float8_e4m3fn if float8 else dtype
    row_bytes = 2 * HEAD_DIM * kv_cache_dtype.itemsize
    layer_bytes = batch * seq_len * NUM_KV_HEADS * row_bytes
    layers = max(2, min(8, MAX_LAYER_BYTES // layer_bytes))
    weights = hata.HashWeights.random(
        num_layers=layers, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM
    )
    config = hata.HataConfig(top_k=top_k, num_dense_layers=0, min_sparse_len=0)
    max_seq_len = seq_len + ROOM
    shape: dict[str, Any] = {"batch": batch, "max_seq_len": max_seq_len}
    shape |= {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "device": device}
    host_memory = 2 * layers * layer_bytes
    queries = torch.randn(2, NUM_STEPS, layers, batch, 1, NUM_HEADS, HEAD_DIM).to(device, dtype)
    new = torch.randn(2, batch, 1, NUM_KV_HEADS, HEAD_DIM).to(device, dtype)
    row: Row = {"layers": layers, "top_k": top_k, "pcie_bytes": 0}
    row["kv_cache_dtype"] = str(kv_cache_dtype).removeprefix("torch.")
    selected_bytes = batch * NUM_KV_HEADS * top_k * row_bytes

    on_gpu = {"resident", "resident_dense"}
    if on_gpu.intersection(modes):
        cache = hata.HataCache(weights, config, page_size=64, **shape)
        fill(cache, seq_len)
        if "resident" in modes:
            yield row | times(timed(timer, cache, queries[0], new)) | {"mode": "resident"}
        if "resident_dense" in modes:
            step = times(timer(dense_calls(cache, queries)))
            yield row | step | {"mode": "resident_dense", "top_k": None}
        del cache
    if on_gpu.issuperset(modes):
        return
    cache = OffloadedCache(weights, config, host_memory=host_memory, **shape)
    fill(cache, seq_len)
    rows, cache.row_cache = cache.row_cache, None
    assert rows is not None  # which num_slots makes
    if "mapped" in modes:
        step = times(timed(timer, cache, queries[0], new))
        yield row | step | {"mode": "mapped", "pcie_bytes": selected_bytes}
    if "dense" in modes:
        step = times(timer(dense_calls(cache, queries)))
        yield row | step | {"mode": "dense", "pcie_bytes": layer_bytes, "top_k": None}
    for host_step in HOST_STEPS:
        if host_step.mode in modes:
            with open_step(cache):
                by_host = host_step(cache, NUM_HEADS)
                timing = Runner(by_host, calls(queries[0], new)).timed(timer.budget_s)
            yield row | times(timing) | {"mode": by_host.mode} | by_host.columns()
    for similarity in SIMILARITIES:
        shared, own = math.sqrt(similarity), math.sqrt(1 - similarity)
        mixed = shared * queries[0, :1] + own * queries[1]
        similar = row | {"num_slots": rows.num_slots, "similarity": similarity}
        if "row_cache" in modes:
            cache.row_cache = rows
            step = times(timed(timer, cache, mixed, new)) | {"mode": "row_cache"}
            yield similar | step | missed(rows.num_missing, top_k, row_bytes)
        if "hybrid" in modes:
            with open_step(cache):
                hybrid = Hybrid(cache, NUM_HEADS, rows.num_slots)
                timing = Runner(hybrid, calls(mixed, new)).timed(timer.budget_s)
            step = times(timing) | {"mode": "hybrid"}
            yield similar | step | missed(hybrid.num_missing, top_k, row_bytes)


def times(timing: Timing) -> Row:
    return {"us": timing.us, "spread_us": timing.spread_us}


def missed(num_missing: Tensor, top_k: int, row_bytes: int) -> Row:
    """Returns what the last steps of the layers missed, ``[num_layers, batch, num_kv_heads]``."""
    mean = num_missing.float().mean().item()
    num_lists = num_missing[0].numel()
    return {"hit_rate": 1 - mean / top_k, "pcie_bytes": round(mean * num_lists * row_bytes)}


def fill(cache: hata.HataCache, seq_len: int) -> None:
    """Fills every sequence with random keys and values."""
    shape = (cache.batch, cache.num_kv_heads, cache.head_dim)
    chunk = max(1, FILL_CHUNK // cache.batch)
    for start in range(0, seq_len, chunk):
        q_len = min(chunk, seq_len - start)
        for layer_idx in range(cache.num_layers):
            k, v = (
                torch.randn(shape[0], q_len, *shape[1:], dtype=cache.dtype, device=cache.device)
                for _ in range(2)
            )
            cache.append(layer_idx, k, v)


@contextmanager
def open_step(cache: hata.HataCache) -> Iterator[None]:
    """Opens a step that is written again and again, and takes it back."""
    lengths = cache.seq_lens
    cache.extend(1)
    yield
    cache.close_step()
    cache.truncate(lengths)


def calls(queries: Tensor, new: Tensor) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Returns layer, query, key and value; queries ``[steps, layers, batch, 1, ...]``."""
    return [(layer_idx, q, *new) for step in queries for layer_idx, q in enumerate(step)]


def timed(timer: Timer, cache: hata.HataCache, queries: Tensor, new: Tensor) -> Timing:
    """Times a layer's step, over steps and layers; queries ``[steps, layers, batch, 1, ...]``."""
    with open_step(cache):
        return timer(
            [
                partial(hata.decode_attention, q, k, v, cache, layer_idx)
                for layer_idx, q, k, v in calls(queries, new)
            ]
        )


def dense_calls(cache: hata.HataCache, queries: Tensor) -> list[Call]:
    """Returns each layer's dense attention."""
    return [
        partial(
            hata.dense_attention,
            *(queries[0, 0, layer_idx], cache.k_cache[layer_idx], cache.v_cache[layer_idx]),
            *(cache.block_table, cache.cache_seqlens),
        )
        for layer_idx in range(cache.num_layers)
    ]
