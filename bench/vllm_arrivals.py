"""Serving in vLLM's engine: hata against vLLM's own attention, requests that come when they come.

Requests arrive by a Poisson process with a fixed seed, as many tokens long as the mix says in turn,
in a random order that is the same for every engine. ``tokens_per_s`` is all output tokens by the
time from the first arrival to the last token. A request's time per output token (``tpot``) is that
from its first token to its last by the tokens between, its time to the first token (``ttft``) is
counted from its arrival. A process of its own runs each engine, the model has dummy weights.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, cycle, islice
from statistics import median, quantiles
from typing import Annotated, Any

import torch
from rich.console import Console
from typer import Option

from hata.checks import check, check_int
from hata.commands.options import with_options
from hata.provenance import origin

from .options import check_output, repeated
from .report import RESULTS, Report, Row, slug
from .vllm import (
    Engine,
    EngineOptions,
    in_a_process,
    prompts,
    random_tokens,
    sampling,
    top_k_of,
)

MIX = tuple(k << 10 for k in (1, 4, 16, 32, 64))
RATES = (1.0, 2.0, 4.0)
QUESTION = 32  # tokens of its own that a request adds to a document
COLUMNS = ["vllm", "shape", "layers", "dense_layers", "tp", "top_k", "backend", "mix", "documents"]
COLUMNS += ["requests", "output_tokens", "rate", "tokens_per_s", "tpot_p50_ms", "tpot_p99_ms"]
COLUMNS += ["ttft_p50_s", "kv_cache_dtype", "kv_tokens"]
SHOWN = {name: name.replace("_", " ") for name in COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions):
    """What the command line chose."""

    mix: Annotated[
        list[int], Option(help=f"Tokens of a prompt; may be repeated. By default {MIX}.")
    ] = field(default_factory=list)
    documents: Annotated[
        int,
        Option(
            help="Prompts that are in the prefix cache beforehand; requests ask about them in "
            "turn. 0: every request has a prompt of its own."
        ),
    ] = 0
    requests: Annotated[int, Option(help="At each rate.")] = 16
    rate: Annotated[
        list[float], Option(help=f"Requests a second; may be repeated. By default {RATES}.")
    ] = field(default_factory=list)
    tokens: Annotated[int, Option(help="To generate for each request.")] = 256
    max_num_seqs: Annotated[int, Option(help="Requests that vLLM serves at once.")] = 16

    def words(self) -> list[str]:
        """Returns the options that decide what a row holds, as they are typed."""
        return [
            *super().words(),
            *repeated("--mix", [str(tokens) for tokens in self.mix]),
            f"--documents {self.documents} --requests {self.requests}",
            *repeated("--rate", [f"{rate:g}" for rate in self.rate]),
            f"--tokens {self.tokens} --max-num-seqs {self.max_num_seqs}",
        ]


@dataclass(frozen=True)
class Load:
    """What arrives."""

    mix: list[int]
    documents: int
    requests: int
    tokens: int
    rates: list[float]


@dataclass
class Served:
    """One request: seconds since the start of the run."""

    arrival: float
    first: float = 0.0  # token
    last: float = 0.0
    num_tokens: int = 0


@with_options()
def measure_arrivals(options: Options) -> None:
    """Measures serving in vLLM's engine, with hata and without, at several rates of arrival."""
    for name, least in (("documents", 0), ("requests", 2), ("tokens", 2), ("max_num_seqs", 1)):
        check_int("bench", f"--{name.replace('_', '-')}", getattr(options, name), least)
    mix, rates = options.mix or list(MIX), options.rate or list(RATES)
    check(min(mix) >= 1, "bench", "--mix", "be at least 1", min(mix))
    check(min(rates) > 0, "bench", "--rate", "be above 0", min(rates))
    max_len = max(mix) + QUESTION + options.tokens
    batches = [batch for batch in (1, 2, 4, 8, 12) if batch < options.max_num_seqs]
    batches += range(16, options.max_num_seqs, 8)
    batches.append(options.max_num_seqs)
    engines = list(options.engines(max_len, batches, [top_k_of(max(mix))]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.output or RESULTS / f"vllm_arrivals_{slug(device)}.csv"
    check_output(path)
    command = " ".join(["python -m bench vllm-arrivals", *options.words()])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    load = Load(mix, options.documents, options.requests, options.tokens, rates)
    for engine in engines:
        for row in in_a_process(rows_of, engine, load):
            report.add(row)
    report.show(Console(), SHOWN, "Serving in vLLM", "dummy weights, bfloat16, CUDA graphs")
    print(f"{len(report.rows)} rows in {path}")


def rows_of(engine: Engine, load: Load) -> list[Row]:
    return list(measure(engine, load))


def measure(engine: Engine, load: Load) -> Iterator[Row]:
    llm = engine.start(enable_prefix_caching=load.documents > 0)
    common, draw = engine.columns(llm), random.Random(0)
    common |= {"mix": " ".join(map(str, load.mix)), "documents": load.documents}
    common |= {"requests": load.requests, "output_tokens": load.tokens}
    lengths = cycle(load.mix)
    documents = [random_tokens(n, draw) for n in islice(lengths, load.documents)]
    room, total = common["kv_tokens"] - engine.max_len, sum(map(len, documents))
    check(total <= room, "bench", "--documents", f"have at most {room} tokens here", total)
    first = documents or [random_tokens(n, draw) for n in load.mix]  # warms what prefills, too
    llm.generate(prompts(first), sampling(2), use_tqdm=False)
    for rate in load.rates:
        if documents:
            asked = islice(cycle(documents), load.requests)
            requests = [document + random_tokens(QUESTION, draw) for document in asked]
        else:
            requests = [random_tokens(n, draw) for n in islice(cycle(load.mix), load.requests)]
        order = random.Random(0)
        order.shuffle(requests)
        gaps = (order.expovariate(rate) for _ in requests[1:])
        arrivals = list(accumulate(gaps, initial=0.0))
        row = summary(serve(llm.llm_engine, prompts(requests), arrivals, load.tokens))
        shown = "{tokens_per_s:.0f} tokens/s, {tpot_p50_ms:.2f} ms a token".format(**row)
        print(f"{engine.backend}: {rate:g} requests a second: {shown}", flush=True)
        yield common | {"rate": rate} | row


def serve(engine: Any, asked: list[Any], arrivals: list[float], num_tokens: int) -> list[Served]:
    """Gives the engine each prompt when it arrives, and notes when its tokens come."""
    from vllm.sampling_params import RequestOutputKind

    params = sampling(num_tokens)
    params.output_kind = RequestOutputKind.DELTA
    served = [Served(arrival) for arrival in arrivals]
    waiting, start = 0, time.perf_counter()
    while waiting < len(served) or engine.has_unfinished_requests():
        now = time.perf_counter() - start
        while waiting < len(served) and served[waiting].arrival <= now:
            engine.add_request(str(waiting), asked[waiting], params)
            waiting += 1
        if not engine.has_unfinished_requests():
            time.sleep(served[waiting].arrival - now)
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            request = served[int(output.request_id)]
            request.first = request.first or now
            request.last = now
            request.num_tokens += sum(len(answer.token_ids) for answer in output.outputs)
    return served


def summary(served: list[Served]) -> Row:
    """Returns the columns that sum up a run."""
    tpot = [1e3 * (r.last - r.first) / (r.num_tokens - 1) for r in served]
    end = max(request.last for request in served)
    return {
        "tokens_per_s": sum(request.num_tokens for request in served) / end,
        "tpot_p50_ms": median(tpot),
        "tpot_p99_ms": quantiles(tpot, n=100, method="inclusive")[98],
        "ttft_p50_s": median(request.first - request.arrival for request in served),
    }
