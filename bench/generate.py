"""Decoding of a whole transformers model: hata against transformers' own attention and caches.

The model has random weights. Its cache is filled with random keys and values, and then tokens are
decoded: ``ms_per_token`` is the time of 32 forward passes by 32, each of which takes the last one's
most likely token; ``generate_ms_per_token`` is the median time from one of the last 32 tokens of
``generate`` to the next. ``prefill_s`` is the time of the prompt's pass, of at most 32K tokens.
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
from hata.provenance import origin

from .cases import tokens
from .options import Output, check_output, checked_device, checked_names, repeated
from .report import RESULTS, Report, Row, slug
from .timing import first_line
from .vllm import parsed, top_k_of

NEW_TOKENS = 32
WARM_UP = 8  # of which the fourth is the first that is only replayed
ROOM = 256  # of a sequence, for what is decoded
MAX_PREFILL = 32 << 10
CASES = ((1, 128), (1, 1 << 10), (1, 8 << 10), (1, 32 << 10), (1, 128 << 10), (8, 1 << 10))
CASES += ((8, 8 << 10), (8, 32 << 10), (4, 64 << 10))
LLAMA = {"vocab_size": 128256, "max_position_embeddings": 1 << 20, "rope_theta": 5e5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, **LLAMA},
    ),
    "llama-2-7b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, **LLAMA, "vocab_size": 32000},
    ),
    "smollm2-135m": (
        "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, **LLAMA, "vocab_size": 49152},
    ),
    "gemma-3-270m": (
        "gemma3_text",
        {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}
        | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
        | {"vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512},
    ),
}
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
    "top_k",
]
COLUMNS += ["ms_per_token", "generate_ms_per_token", "tokens_per_s", "prefill_s", "peak_gb"]
COLUMNS += ["codes_percent"]
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

    def words(self) -> list[str]:
        """Returns the options that decide what a row holds, as they are typed."""
        return [
            f"--model {self.model}",
            *([f"--layers {self.layers}"] if self.layers else []),
            *repeated("--case", self.case),
            *repeated("--dense-layers", map(str, self.dense_layers)),
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
    path = options.output or RESULTS / f"generate_{slug(device)}.csv"
    check_output(path)
    command = " ".join([f"python -m bench generate --device {device.type}", *options.words()])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    console = Console(stderr=True)
    model = random_model(name, options.layers, device)
    common = {"transformers": transformers.__version__, "model": name}
    common["dtype"] = str(model.dtype).removeprefix("torch.")
    common["layers"] = model_shape(model)["num_layers"]
    runs = [
        (method, count)
        for method in methods
        for count in ((options.dense_layers or [2, 0]) if "hata" in method else [None])
    ]
    with Progress(console=console, transient=True) as progress, torch.no_grad():
        for batch, context in progress.track(cases, description="cases"):
            for method, dense_layers in runs:
                row = common | {"batch": batch, "context": context, "method": method}
                try:
                    measured = measure(model, method, dense_layers, batch, context)
                except torch.OutOfMemoryError as error:
                    where = f"{method}, {batch} x {tokens(context)}"
                    console.print(f"{where}: {first_line(error)}", highlight=False)
                    continue
                finally:
                    disable(model)
                report.add(row | measured)
    report.show(Console(), SHOWN, "Decoding with transformers", "random weights")
    print(f"{len(report.rows)} rows in {path}")


def random_model(name: str, layers: int | None, device: torch.device) -> Any:
    kind, sizes = SHAPES[name]
    config = transformers.AutoConfig.for_model(
        kind, **sizes | ({"num_hidden_layers": layers} if layers else {})
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def measure(
    model: Any, method: str, dense_layers: int | None, batch: int, context: int
) -> dict[str, Any]:
    """Returns the columns of one method and case."""
    device = model.device
    on_gpu, max_seq_len = device.type == "cuda", context + ROOM
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row: Row = {}
    make: Callable[[], Any]
    if method == "dynamic":
        make = partial(DynamicCache, config=model.config)
    elif method == "static":
        make = partial(StaticCache, config=model.config, max_cache_len=max_seq_len)
    else:
        count = model_shape(model)["num_layers"] if method == "dense" else dense_layers
        budget = hata.HataConfig(top_k=top_k_of(context), num_dense_layers=count)
        make = partial(
            *(enable, model, budget),
            weights=hata.HashWeights.random(**model_shape(model)),
            max_seq_len=min(max_seq_len, model.config.max_position_embeddings),
            cuda_graphs=False if method == "hata-eager" else None,
            offload=HOST_MEMORY if method == "hata-offload" else None,
        )
        row |= {"dense_layers": count, "top_k": budget.top_k}
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
            x = token
            for _ in range(NEW_TOKENS):
                x = step(x)

        row["ms_per_token"] = 1e3 * seconds(decode) / NEW_TOKENS
        if method != "static":
            row["generate_ms_per_token"] = 1e3 * generate(model, cache, batch)
    row["tokens_per_s"] = 1e3 * batch / row["ms_per_token"]
    if on_gpu:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if isinstance(cache, HataTransformersCache):
        row["codes_percent"] = codes_percent(cache.hata_cache)
    return row


def prefill(model: Any, ids: Tensor, make: Callable[[], Any]) -> float:
    """Returns the seconds of a prompt's pass, the second with a cache of hata's.

    The first takes the memory: host memory is pinned as it comes into use.
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


def codes_percent(cache: hata.HataCache) -> float:
    """Returns the codes' bytes by those of keys and values, in percent."""
    kv = sum(t.nbytes for t in (*cache.k_cache, *cache.v_cache))
    norms = cache.norm_cache if cache.weights.key_norms else ()
    return 100 * sum(t.nbytes for t in (*cache.code_cache, *norms)) / kv


def seconds(call: Callable[[], object]) -> float:
    """Returns how long a call takes, the device's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else nullcontext
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start
