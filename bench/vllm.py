"""Decoding in vLLM's engine: hata against vLLM's own attention, a model with dummy weights.

A process of its own runs each engine. ``ms_per_token`` is the time of 96 more tokens than 1 by 96,
after the prompts are in the prefix cache; ``prefill_s`` is that of the prompts and one token, and
empty where random numbers took the prompts' place.
"""

import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import torch
from rich.console import Console
from typer import Option

from hata.checks import check
from hata.commands.options import with_options
from hata.provenance import origin

from .cases import PAPER_BUDGET, tokens
from .options import Output, check_output, repeated
from .report import RESULTS, Report, Row, slug

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # no NVLink multicast, which not every machine has
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, which asks for its cache
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
RANDOM_CACHE = {
    "kv_connector": "RandomCache",
    "kv_connector_module_path": "bench.vllm_random",
    "kv_role": "kv_both",
}
NEW_TOKENS = 96
ROOM = 1024  # of a sequence, for what is decoded
MIN_TOP_K = 512
CASES = [(1, 128), (1, 1 << 10), (1, 8 << 10), (1, 32 << 10), (1, 128 << 10)]
CASES += [(8, 1 << 10), (8, 4 << 10), (8, 32 << 10), (12, 32 << 10), (3, 128 << 10)]
BACKENDS = ("FLASH_ATTN", "hata")
MEMORY_SHARE = 0.88  # of a card
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}
COLUMNS = ["vllm", "shape", "layers", "dense_layers", "tp", "batch", "context", "top_k", "backend"]
COLUMNS += ["ms_per_token", "tokens_per_s", "prefill_s", "kv_cache_dtype", "kv_tokens"]
SHOWN = {name: name.replace("_", " ") for name in COLUMNS}

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Output):
    """Of which engines of a model with dummy weights."""

    shape: Annotated[str, Option(help=f"Of the model: {', '.join(SHAPES)}.")] = "8b"
    layers: Annotated[int | None, Option(help="Fewer layers than the model has.")] = None
    tp: Annotated[int, Option(help="GPUs for tensor parallelism.")] = 1
    backend: Annotated[
        list[str],
        Option(
            help='"hata", or a backend of vLLM as vLLM calls it; may be repeated. By default '
            "FLASH_ATTN and hata; FLASHINFER compiles for a minute or more before it is measured."
        ),
    ] = field(default_factory=list)
    dense_layers: Annotated[int, Option(help="First layers that stay dense, with hata.")] = 2
    memory: Annotated[float, Option(help="Of a card, for weights, cache and all.")] = MEMORY_SHARE
    kv_cache_dtype: Annotated[str, Option(help='Of keys and values, such as "fp8".')] = "auto"

    def words(self) -> list[str]:
        """Returns the options that decide what a row holds, as they are typed."""
        return [
            f"--shape {self.shape} --tp {self.tp} --dense-layers {self.dense_layers}",
            *([f"--layers {self.layers}"] if self.layers else []),
            *([f"--memory {self.memory:g}"] if self.memory != MEMORY_SHARE else []),
            *([f"--kv-cache-dtype {self.kv_cache_dtype}"] if self.kv_cache_dtype != "auto" else []),
        ]

    def engines(self, max_len: int, batches: list[int], top_ks: list[int]) -> Iterator["Engine"]:
        """Yields what to measure: each backend, hata with each ``top_k``."""
        known = ", ".join(SHAPES)
        check(self.shape in SHAPES, "bench", "--shape", f"be one of {known}", self.shape)
        check(0 < self.memory < 1, "bench", "--memory", "be in 0..1", self.memory)
        shape = SHAPES[self.shape]
        model = shape | {"num_hidden_layers": self.layers or shape["num_hidden_layers"]}
        for backend in self.backend or BACKENDS:
            for top_k in top_ks if backend == "hata" else [0]:
                yield Engine(
                    backend,
                    top_k,
                    max_len,
                    sorted(set(batches)),
                    self.shape,
                    model,
                    self.tp,
                    self.dense_layers,
                    self.memory,
                    self.kv_cache_dtype,
                )


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions):
    """What the command line chose."""

    case: Annotated[list[str], Option(help='"12x32768": sequences x tokens; may be repeated.')] = (
        field(default_factory=list)
    )
    fill: Annotated[
        bool, Option("--fill", help="Random numbers in the cache in place of prompts' prefill.")
    ] = False

    def words(self) -> list[str]:
        """Returns the options that decide what a row holds, as they are typed."""
        return [*super().words(), *["--fill"] * self.fill, *repeated("--case", self.case)]


@dataclass(frozen=True)
class Engine:
    """One engine of a model with dummy weights."""

    backend: str
    top_k: int  # 0 without hata
    max_len: int
    batches: list[int]
    shape: str
    model: dict[str, int]
    tp: int
    dense_layers: int
    memory: float
    kv_cache_dtype: str

    def start(self, **settings: Any) -> Any:
        """Starts it, in this process."""
        from transformers import LlamaConfig

        from hata.integrations.vllm import engine_args

        config = LlamaConfig(
            **self.model,
            architectures=["LlamaForCausalLM"],
            vocab_size=128256,
            max_position_embeddings=self.max_len,
            rope_theta=5e5,
            dtype="bfloat16",
            tie_word_embeddings=False,
        )
        attention: dict[str, Any] = {"attention_backend": self.backend}
        if self.backend == "hata":
            budget = {"top_k": self.top_k, "num_dense_layers": self.dense_layers}
            attention = engine_args("random", **budget)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            llm = start(
                folder,
                self.max_len,
                self.batches,
                load_format="dummy",
                dtype="bfloat16",
                skip_tokenizer_init=True,
                tensor_parallel_size=self.tp,
                gpu_memory_utilization=self.memory,
                kv_cache_dtype=self.kv_cache_dtype,
                **attention,
                **settings,
            )
        # FlashInfer compiles when it first attends to a prompt.
        warm = random_tokens(64, random.Random(0))
        llm.generate(prompts([warm]), sampling(2), use_tqdm=False)
        return llm

    def columns(self, llm: Any) -> Row:
        """Returns the columns of a row that are the engine's."""
        import vllm

        cache = llm.llm_engine.vllm_config.cache_config
        return {
            "vllm": vllm.__version__,
            "shape": self.shape,
            "layers": self.model["num_hidden_layers"],
            "dense_layers": self.dense_layers if self.top_k else None,
            "tp": self.tp,
            "top_k": self.top_k or None,
            "backend": self.backend,
            "kv_cache_dtype": self.kv_cache_dtype,
            "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        }


@with_options()
def measure_vllm(options: Options) -> None:
    """Measures decoding in vLLM's engine, with hata and without."""
    chosen = [parsed(text) for text in options.case] or CASES
    max_len = max(context for _, context in chosen) + ROOM
    top_ks = sorted({top_k_of(context) for _, context in chosen})
    engines = list(options.engines(max_len, [batch for batch, _ in chosen], top_ks))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.output or RESULTS / f"vllm{'_fill' * options.fill}_{slug(device)}.csv"
    check_output(path)
    command = " ".join(["python -m bench vllm", *options.words()])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    for engine in engines:
        cases = [case for case in chosen if engine.top_k in (0, top_k_of(case[1]))]
        for row in in_a_process(rows_of, engine, cases, options.fill):
            report.add(row)
    report.show(Console(), SHOWN, "Decoding in vLLM", "dummy weights, bfloat16, CUDA graphs")
    print(f"{len(report.rows)} rows in {path}")


def parsed(text: str) -> tuple[int, int]:
    batch, _, context = text.partition("x")
    fits = batch.isdigit() and context.isdigit() and int(batch) > 0 < int(context)
    check(fits, "bench", "--case", 'be like "12x32768"', text)
    return int(batch), int(context)


def top_k_of(context: int) -> int:
    return max(MIN_TOP_K, round(context * PAPER_BUDGET))


def in_a_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function that starts an engine in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=set_environment) as pool:
        return pool.submit(function, *arguments).result()


def set_environment() -> None:
    os.environ |= {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}


def start(model: str, max_len: int, batches: list[int], **settings: Any) -> Any:
    """Starts an engine in this process, with CUDA graphs for batches that decode."""
    import vllm
    from vllm.platforms import current_platform

    default = {
        "max_model_len": max_len,
        "max_num_seqs": max(batches),
        "max_num_batched_tokens": min(16384, max_len),
        "gpu_memory_utilization": MEMORY_SHARE,
        "block_size": 32 if current_platform.is_cpu() else 16,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": batches,
        },
    }
    return vllm.LLM(model, **(default | settings))


def sampling(num_tokens: int) -> Any:
    import vllm

    return vllm.SamplingParams(
        max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False
    )


def random_tokens(count: int, draw: random.Random) -> list[int]:
    return [draw.randrange(3, 128000) for _ in range(count)]


def prompts(asked: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": token_ids} for token_ids in asked]


def rows_of(engine: Engine, cases: list[tuple[int, int]], fill: bool) -> list[Row]:
    return list(measure(engine, cases, fill))


def measure(engine: Engine, cases: list[tuple[int, int]], fill: bool) -> Iterator[Row]:
    llm = engine.start(**({"kv_transfer_config": RANDOM_CACHE} if fill else {}))
    common, draw = engine.columns(llm), random.Random(0)
    for batch, context in cases:
        asked = prompts([random_tokens(context, draw) for _ in range(batch)])

        def seconds(num_tokens: int) -> float:
            start = time.perf_counter()
            llm.generate(asked, sampling(num_tokens), use_tqdm=False)  # noqa: B023  (used here)
            return time.perf_counter() - start

        prefill = seconds(1)
        seconds(9)
        one = min(seconds(1) for _ in range(2))
        step = (seconds(1 + NEW_TOKENS) - one) / NEW_TOKENS
        row = {"batch": batch, "context": context, "ms_per_token": step * 1e3}
        print(f"{engine.backend}: {batch} x {tokens(context)}: {step * 1e3:.2f} ms", flush=True)
        yield common | row | {"tokens_per_s": batch / step, "prefill_s": None if fill else prefill}
