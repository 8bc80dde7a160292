"""Decoding of a whole transformers model: hata against transformers' own attention and caches.

The model has random weights. Its cache is filled with random keys and values (``fill``), and then
tokens are decoded: ``ms_per_token`` is the time of 32 forward passes by 32, each of which takes the
last one's most likely token; ``generate_ms_per_token`` is the median time from one of the last 32
tokens of ``generate`` to the next. ``prefill_s`` is the time of the prompt's pass, of at most 32K
tokens.

What keys and values in host memory cost depends on how much of a selection the row cache already
holds. Queries of a random model have nothing to do with one another; with ``--similarity`` the
queries of any two tokens have that cosine. ``hit_rate`` is what the row cache counted in tokens
after those that were timed.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer
from typer import Option

import hata
from hata.checks import check
from hata.commands.options import with_options
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import disable, enable
from hata.integrations.transformers_cache import CACHE_ARGUMENT, HataTransformersCache
from hata.integrations.transformers_layers import HataLayer, WindowLayer
from hata.offload import OffloadedCache
from hata.provenance import origin
from hata.row_cache import RowCache
from hata.storage import FLOAT8

from .cases import name_of, tokens
from .options import Output, check_output, checked_device, checked_names, repeated
from .random_model import SHAPES, random_model, share_embeddings
from .report import RESULTS, Report, Row, slug
from .timing import first_line
from .vllm import parsed, top_k_of

NEW_TOKENS = 32
WARM_UP = 8  # of which the fourth is the first that is only replayed
NUM_COUNTED = 8  # tokens whose hits are counted
ROOM = 256  # of a sequence, for what is decoded
MAX_PREFILL = 32 << 10
CASES = ((1, 128), (1, 1 << 10), (1, 8 << 10), (1, 32 << 10), (1, 128 << 10), (8, 1 << 10))
CASES += ((8, 8 << 10), (8, 32 << 10), (4, 64 << 10))
# method: what it is. Those with a cache of hata count their dense layers.
METHODS = {
    "dynamic": "transformers' growing cache, its attention by FlashAttention where torch has it",
    "static": "transformers' static cache, the forward pass captured in a CUDA graph",
    "dense": "hata's cache, every layer dense, captured",
    "hata-eager": "hata, not captured",
    "hata": "hata, captured",
    "hata-offload": "the same, keys and values in host memory",
}
ASKED_FOR = ("hata-offload",)  # not measured by default
HOST_MEMORY = 1 << 40  # no more is taken than the context needs
COLUMNS = [
    "transformers",
    "model",
    "dtype",
    "layers",
    "batch",
    "context",
    "method",
    "dense_layers",
    "share_selection",
    "top_k",
    "kv_cache_dtype",
    "fill",
    "similarity",
    "num_slots",
    "hit_rate",
]
COLUMNS += ["ms_per_token", "generate_ms_per_token", "tokens_per_s", "prefill_s", "peak_gb"]
COLUMNS += ["host_gb", "codes_percent"]
SHOWN = {name: name.replace("_", " ") for name in COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """What the command line chose."""

    device: Annotated[
        str | None, Option(help="cpu or cuda; by default cuda where there is one.")
    ] = None
    model: Annotated[str, Option(help=f"Whose shape: {', '.join(SHAPES)}.")] = "llama-3.1-8b"
    layers: Annotated[int | None, Option(help="Fewer layers than the model has.")] = None
    method: Annotated[
        list[str], Option(help=f"{', '.join(METHODS)}; may be repeated. By default all.")
    ] = field(default_factory=list)
    case: Annotated[list[str], Option(help='"8x32768": sequences x tokens; may be repeated.')] = (
        field(default_factory=list)
    )
    dense_layers: Annotated[
        list[int], Option(help="First layers that stay dense, with hata; may be repeated.")
    ] = field(default_factory=list)
    kv_cache_dtype: Annotated[
        str | None, Option(help="float8_e4m3fn: keys and values of hata's caches in float8.")
    ] = None
    share_selection: Annotated[
        list[int],
        Option(
            help="Every so many sparse layers select, with hata; may be repeated. By default 1."
        ),
    ] = field(default_factory=list)
    similarity: Annotated[
        float | None,
        Option(help="Cosine between the queries of two tokens; by default as they are drawn."),
    ] = None

    def words(self) -> list[str]:
        """Returns the options that decide what a row holds, as they are typed."""
        return [
            f"--model {self.model}",
            *([f"--layers {self.layers}"] if self.layers else []),
            *repeated("--case", self.case),
            *repeated("--method", self.method),
            *repeated("--dense-layers", [str(count) for count in self.dense_layers]),
            *repeated("--share-selection", [str(count) for count in self.share_selection]),
            *([f"--kv-cache-dtype {self.kv_cache_dtype}"] if self.kv_cache_dtype else []),
            *([] if self.similarity is None else [f"--similarity {self.similarity:g}"]),
        ]


@with_options()
def measure_generate(options: Options) -> None:
    """Measures decoding of a whole transformers model, with hata and without."""
    name, device = options.model, checked_device(options.device)
    check(name in SHAPES, "bench", "--model", f"be one of {', '.join(SHAPES)}", name)
    left_out = (*ASKED_FOR, *(["hata-eager"] if device.type == "cpu" else []))
    default = [method for method in METHODS if method not in left_out]
    methods = checked_names("--method", options.method, METHODS, default)
    cases = [parsed(text) for text in options.case] or CASES
    float8, similarity = options.kv_cache_dtype, options.similarity
    rule = "be float8_e4m3fn"
    check(float8 in (None, name_of(FLOAT8)), "bench", "--kv-cache-dtype", rule, float8)
    in_range = similarity is None or 0 <= similarity <= 1
    check(in_range, "bench", "--similarity", "be in 0..1", similarity)
    path = options.output or RESULTS / f"generate_{slug(device)}.csv"
    check_output(path)
    command = " ".join([f"python -m bench generate --device {device.type}", *options.words()])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    console = Console(stderr=True)
    model = random_model(name, options.layers, device)
    if similarity is not None:
        share_embeddings(model, similarity)
    common = {"transformers": transformers.__version__, "model": name}
    common["dtype"] = str(model.dtype).removeprefix("torch.")
    common |= {"layers": model_shape(model)["num_layers"], "similarity": similarity}
    dense, share = options.dense_layers or [2, 0], options.share_selection or [1]
    runs = [
        (method, *counts)
        for method in methods
        for counts in (itertools.product(dense, share) if "hata" in method else [(None, None)])
    ]
    with Progress(console=console, transient=True) as progress, torch.no_grad():
        for batch, context in progress.track(cases, description="cases"):
            for method, *counts in runs:
                row = common | {"batch": batch, "context": context, "method": method}
                try:
                    kv_cache_dtype = FLOAT8 if float8 else None
                    measured = measure(model, method, *counts, batch, context, kv_cache_dtype)
                except torch.OutOfMemoryError as error:
                    where = f"{method}, {batch} x {tokens(context)}"
                    console.print(f"{where}: {first_line(error)}", highlight=False)
                    continue
                finally:
                    disable(model)
                report.add(row | measured)
    report.show(Console(), SHOWN, "Decoding with transformers", "random weights")
    print(f"{len(report.rows)} rows in {path}")


def measure(
    model: Any,
    method: str,
    dense_layers: int | None,
    share_selection: int | None,
    batch: int,
    context: int,
    kv_cache_dtype: torch.dtype | None,
) -> Row:
    """Returns the columns of one method and case."""
    device = model.device
    on_gpu, max_seq_len = device.type == "cuda", context + ROOM
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row: Row = {"fill": "random keys and values"}
    make: Callable[[], Any]
    if method == "dynamic":
        make = partial(DynamicCache, config=model.config)
    elif method == "static":
        make = partial(StaticCache, config=model.config, max_cache_len=max_seq_len)
    else:
        count = model_shape(model)["num_layers"] if method == "dense" else dense_layers
        budget = hata.HataConfig(
            top_k=top_k_of(context), num_dense_layers=count, share_selection=share_selection or 1
        )
        make = partial(
            *(enable, model, budget),
            weights=hata.HashWeights.random(**model_shape(model)),
            max_seq_len=min(max_seq_len, model.config.max_position_embeddings),
            kv_cache_dtype=kv_cache_dtype,
            cuda_graphs=False if method == "hata-eager" else None,
            offload=HOST_MEMORY if method == "hata-offload" else None,
        )
        row |= {"dense_layers": count, "top_k": budget.top_k}
        row["share_selection"] = share_selection
    flash = on_gpu and method == "dynamic"
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device=device)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
        if batch * context <= MAX_PREFILL and method != "static":
            row["prefill_s"] = prefill(model, ids, make)
        cache = make()
        fill(model, cache, batch, context)
        step = static_step(model, cache, batch) if method == "static" and on_gpu else None
        step = step or (lambda x: forward(model, x, cache))
        token = ids[:, :1]
        for _ in range(WARM_UP):
            token = step(token)

        def decode() -> None:
            nonlocal token
            for _ in range(NEW_TOKENS):
                token = step(token)

        row["ms_per_token"] = 1e3 * seconds(decode) / NEW_TOKENS
        if isinstance(cache, HataTransformersCache):
            row |= of_cache(cache.hata_cache, step, token)
        if method != "static":
            row["generate_ms_per_token"] = 1e3 * generate(model, cache, batch)
    row["tokens_per_s"] = 1e3 * batch / row["ms_per_token"]
    if on_gpu:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def prefill(model: Any, ids: Tensor, make: Callable[[], Any]) -> float:
    """Returns the seconds of a prompt's pass, the second with a cache of hata's.

    The first takes the memory: host memory is taken as it comes into use.
    """
    cache = make()
    first = seconds(partial(forward, model, ids, cache))
    if isinstance(cache, HataTransformersCache):
        cache.reset()
    else:
        cache = make()
    return min(first, seconds(partial(forward, model, ids, cache)))


def forward(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """One pass; returns each sequence's most likely token, ``[batch, 1]``."""
    out = model(ids, logits_to_keep=1, use_cache=True, **{CACHE_ARGUMENT: cache})
    return out.logits[:, -1:].argmax(-1)


class Clock(BaseStreamer):
    """Notes when `generate` hands over tokens, and how many it has handed over by then."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Takes the prompt, which is counted as none, then tokens; they are on the host."""
        self.counts.append(self.counts[-1] + value.numel() if self.counts else 0)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Takes the end of the text."""


def generate(model: Any, cache: Any, batch: int) -> float:
    """Returns the median time from one of the last tokens to the next, in seconds."""
    ids = torch.full((batch, cache.get_seq_length() + 1), 5, device=model.device)
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=WARM_UP + NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
        **{CACHE_ARGUMENT: cache},
    )
    times = clock.times[-NEW_TOKENS - 1 :]
    return statistics.median(later - sooner for sooner, later in itertools.pairwise(times))


def static_step(model: Any, cache: StaticCache, batch: int) -> Callable[[Tensor], Tensor]:
    """Captures a pass over a static cache; returns what replays it."""
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    position = torch.full((batch, 1), int(cache.get_seq_length()), device=model.device)

    def run() -> Tensor:
        out = model(token, position_ids=position, use_cache=True, **{CACHE_ARGUMENT: cache})
        position.add_(1)
        return out.logits[:, -1:].argmax(-1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def step(x: Tensor) -> Tensor:
        token.copy_(x)
        graph.replay()
        return output

    return step


def fill(model: Any, cache: Any, batch: int, context: int) -> None:
    """Fills an empty cache with random keys and values."""
    shape, dtype = model_shape(model), next(model.parameters()).dtype
    if isinstance(cache, HataTransformersCache):
        forward(model, torch.zeros(batch, 1, dtype=torch.long, device=model.device), cache)
    for layer_idx in range(shape["num_layers"]):
        size = (batch, context, shape["num_kv_heads"], shape["head_dim"])
        k, v = (torch.randn(size, dtype=dtype, device=model.device) for _ in range(2))
        layer = cache.layers[layer_idx]
        if isinstance(layer, HataLayer):
            cache.hata_cache.append(layer.layer_idx, k[:, 1:], v[:, 1:])
            layer.seen = context
        elif isinstance(layer, WindowLayer):
            (windows,) = cache.window_caches
            windows.prefill(layer.layer_idx, *(t[:, 1:] for t in (k, k, v)), softmax_scale=1.0)
            layer.seen = context
        else:
            cache.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)


def of_cache(cache: hata.HataCache, step: Callable[[Tensor], Tensor], token: Tensor) -> Row:
    """Returns the columns that a cache of hata's has: bytes, and how often its row cache hits."""
    kv = [k.nbytes + v.nbytes for k, v in zip(cache.k_cache, cache.v_cache, strict=True)]
    hashed = (*cache.code_cache, *cache.norm_cache)
    codes = sum(t.nbytes for t in hashed if t is not None)
    row: Row = {
        "kv_cache_dtype": name_of(cache.kv_cache_dtype),
        "codes_percent": 100 * codes / sum(kv),
    }
    if isinstance(cache, OffloadedCache):
        row["host_gb"] = sum(kv[cache.num_resident_layers :]) / 1e9
        if cache.row_cache is not None:
            row["num_slots"] = cache.row_cache.num_slots
            row["hit_rate"] = hit_rate(cache, cache.row_cache, step, token)
    return row


def hit_rate(
    cache: OffloadedCache, rows: RowCache, step: Callable[[Tensor], Tensor], token: Tensor
) -> float:
    """Returns the share of the selected rows that the row cache held, over some tokens."""
    missing = selected = 0
    for _ in range(NUM_COUNTED):
        token = step(token)
        missing += int(rows.num_missing.sum())
        for layer_idx in range(cache.num_resident_layers, cache.num_layers):
            selected += int(cache.last_selection(layer_idx)[1].sum())
    return 1 - missing / selected


def seconds(call: Callable[[], object]) -> float:
    """Returns how long a call takes, the device's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else nullcontext
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start
