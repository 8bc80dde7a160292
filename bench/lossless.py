"""Lossless decoding of a real model: how many drafted tokens are accepted, and what a token takes.

The prompts are windows of real prose, which every method continues greedily, past the model's end
token. "dense" is hata's cache with every layer dense, "hata" is sparse; "lossless" drafts with
"hata" and verifies with "dense". On a GPU all decode in CUDA graphs. ``ms_per_token`` is the median
over the prompts of the time from the ``WARM_UP``-th token inside `generate` to the last.
``tokens_equal`` is how many tokens of a text come before the first that differs from dense's,
as a share.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typer import Option

from hata.checks import check_int
from hata.commands.options import with_options
from hata.config import HataConfig
from hata.demo.model import bundled_model, check_model_folder, load_model
from hata.device import ModelOptions, torch_device, torch_dtype
from hata.eval.prose import Prose
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import CACHE_ARGUMENT, enabled
from hata.provenance import origin
from hata.recall.options import chosen_budgets

from .generate import Clock
from .options import Output, check_output, repeated
from .report import RESULTS, Report, Row, slug

WARM_UP = 64  # tokens: until then passes are run eagerly and captured
COLUMNS = ["transformers", "model", "dtype", "context", "method", "num_draft_tokens", "top_k"]
COLUMNS += ["dense_layers", "prompts", "tokens", "accepted", "tokens_equal", "ms_per_token"]
SHOWN = {name: name.replace("_", " ") for name in COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Options(Output, ModelOptions):
    """What the command line chose."""

    weights: Annotated[
        Path | None, Option(help="The model's hash weights; by default the package's.")
    ] = None
    texts: Annotated[
        list[Path], Option(help="Text files or folders for the prompts; by default pydoc's.")
    ] = field(default_factory=list)
    context: Annotated[list[int], Option(help="Tokens of a prompt; may be repeated.")] = field(
        default_factory=lambda: [2048, 4096]
    )
    top_k: Annotated[
        float, Option(metavar="COUNT|SHARE", help="Positions to select, at least 128.")
    ] = 1 / 64
    dense_layers: Annotated[int, Option(help="First layers that stay dense, with hata.")] = 2
    num_draft_tokens: Annotated[list[int], Option(help="Tokens of a draft; may be repeated.")] = (
        field(default_factory=lambda: [2, 4, 8])
    )
    num_prompts: Annotated[int, Option(help="Prompts of each context.")] = 4
    num_tokens: Annotated[int, Option(help="Tokens to write.")] = 256

    def words(self) -> list[str]:
        """Returns the options that decide what a row holds, as they are typed."""
        return [
            *(["--model", self.model.name] if self.model else []),
            *(["--weights", self.weights.name] if self.weights else []),
            *repeated("--texts", [path.name for path in self.texts]),
            *repeated("--context", map(str, self.context)),
            *repeated("--num-draft-tokens", map(str, self.num_draft_tokens)),
            *("--top-k", f"{self.top_k:g}", "--dense-layers", str(self.dense_layers)),
            *("--num-prompts", str(self.num_prompts), "--num-tokens", str(self.num_tokens)),
        ]


@with_options()
def measure_lossless(options: Options) -> None:
    """Measures lossless decoding of a real model: accepted drafts, and time."""
    device = torch_device(options.device, "bench")
    dtype = torch_dtype(options.dtype, device, "bench")
    for number in options.num_draft_tokens:
        check_int("bench", "--num-draft-tokens", number, 1, 31)
    check_int("bench", "--num-prompts", options.num_prompts, 1)
    check_int("bench", "--num-tokens", options.num_tokens, WARM_UP + 1)
    for context in options.context:
        chosen_budgets("bench", [options.top_k], context)
    folder, longest = options.model or bundled_model(), max(options.context) + options.num_tokens
    check_model_folder(folder, longest)
    path = options.output or RESULTS / f"lossless_{slug(device)}.csv"
    check_output(path)
    command = " ".join([f"python -m bench lossless --device {device.type}", *options.words()])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    console, prose = Console(stderr=True), Prose.open(options.texts)
    model, tokenizer = load_model(folder, device, dtype)
    common = {"transformers": transformers.__version__, "model": folder.name}
    common["dtype"] = str(dtype).removeprefix("torch.")
    with Progress(console=console, transient=True) as progress:
        for context in progress.track(options.context, description="contexts"):
            prompts = prose.windows(tokenizer, options.num_prompts, context)
            for row in measure(model, prompts, options):
                report.add(common | {"context": context} | row)
    report.show(Console(), SHOWN, "Lossless decoding", f"greedy, {prose.name}")
    print(f"{len(report.rows)} rows in {path}")


def measure(model: Any, prompts: list[list[int]], options: Options) -> Iterator[Row]:
    """Yields the columns of each method; dense comes first, and is what texts are compared with."""
    top_k = int(options.top_k) if options.top_k >= 1 else options.top_k
    sparse = HataConfig(top_k=top_k, num_dense_layers=options.dense_layers)
    dense = HataConfig(num_dense_layers=model_shape(model)["num_layers"])
    texts: list[Tensor] = []
    lossless = [("lossless", sparse, number) for number in options.num_draft_tokens]
    for method, config, number in [("dense", dense, None), ("hata", sparse, None), *lossless]:
        settings = {} if number is None else {"verify": "dense", "num_draft_tokens": number}
        times, equal, drafted, accepted = [], [], 0, 0
        for i, prompt in enumerate(prompts):
            length = len(prompt) + options.num_tokens
            with enabled(
                model, config, weights=options.weights, max_seq_len=length, **settings
            ) as cache:
                clock, ids = Clock(), torch.tensor([prompt], device=model.device)
                text = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=options.num_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    streamer=clock,
                    **{CACHE_ARGUMENT: cache},
                )[0, len(prompt) :]
            if method == "dense":
                texts.append(text)
            same = (text == texts[i]).cumprod(0).sum()
            times.append(ms_per_token(clock))
            equal.append(same.item() / len(text))
            drafted, accepted = drafted + cache.num_drafted, accepted + cache.num_accepted
        yield {
            "method": method,
            "num_draft_tokens": number,
            "top_k": options.top_k if config is sparse else None,
            "dense_layers": config.num_dense_layers,
            "prompts": len(prompts),
            "tokens": options.num_tokens,
            "accepted": accepted / drafted if drafted else None,
            "tokens_equal": statistics.mean(equal),
            "ms_per_token": statistics.median(times),
        }


def ms_per_token(clock: Clock) -> float:
    """Returns the milliseconds of a token, from the first that comes after `WARM_UP` of them."""
    first = next(i for i, count in enumerate(clock.counts) if count >= WARM_UP)
    seconds = clock.times[-1] - clock.times[first]
    return 1e3 * seconds / (clock.counts[-1] - clock.counts[first])
