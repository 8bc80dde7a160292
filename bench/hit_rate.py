"""How many of the rows that a model selects its last steps had selected: the row cache's hit rate.

The model reads prose and then goes on greedily; each sparse layer's selections of those steps are
then handed to `hata.fetch_rows`, once for each size of the row cache, which starts empty. The first
steps, which fill it, are not counted.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typer import Option

import hata
from hata.checks import check_int
from hata.commands.options import with_options
from hata.device import ModelFolder
from hata.provenance import origin

from .cases import MIN_TOP_K, PAPER_BUDGET
from .options import Output, check_output
from .report import RESULTS, Report, Row

CONTEXTS = [2048, 4096, 7936]
WARM_UP = 8  # steps
SIZES = (1, 2, 4, 8)  # slots for each position that a step selects
DUMMY_HEAD_DIM = 8  # which rows are copied says nothing about what is in them
COLUMNS = ["model", "weights", "context", "steps", "top_k", "num_slots", "layer", "hit_rate"]
SHOWN = {name: name.replace("_", " ") for name in COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """What the command line chose."""

    model: ModelFolder = None
    context: Annotated[
        list[int],
        Option(help="Tokens of the prompt; may be repeated; by default three lengths."),
    ] = field(default_factory=list)
    steps: Annotated[int, Option(help="Tokens that are decoded.")] = 128


@with_options()
def measure_hit_rate(options: Options) -> None:
    """Measures how often the row cache of an offloaded cache holds what a real model selects."""
    from hata.demo.model import bundled_model, check_model_folder, load_model

    check_int("bench", "--steps", options.steps, WARM_UP + 1)
    contexts = options.context or CONTEXTS
    folder = options.model or bundled_model()
    for context in contexts:
        check_model_folder(folder, context + options.steps)
    name = folder.name.lower().replace("-", "_")
    path = options.output or RESULTS / f"row_cache_{name}.csv"
    check_output(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = [*(f"--context {context}" for context in options.context), f"--steps {options.steps}"]
    command = " ".join(["python -m bench hit-rate", *words])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(folder, device, dtype)
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        for context in progress.track(contexts, description="contexts"):
            rows = measure(model, tokenizer, folder, context, options.steps)
            for row in rows:
                report.add({"model": folder.name, "context": context, "steps": options.steps} | row)
    whole = [row for row in report.rows if row["layer"] == "all"]
    report.rows = whole
    report.show(Console(), SHOWN, "Hit rate of the row cache", "greedy decoding after prose")
    print(f"rows in {path}")


def measure(model: Any, tokenizer: Any, folder: Path, context: int, steps: int) -> list[Row]:
    """Returns the columns of each size of the row cache and layer."""
    from hata.demo.prompt import build_prompt
    from hata.integrations.transformers import disable, enable

    selections: dict[int, list[Tensor]] = {}

    def keep(layer_idx: int, q: Tensor, cache: hata.HataCache, indices: Tensor, n: Tensor) -> None:
        selections.setdefault(layer_idx, []).append(indices.cpu().clone())

    token_ids = build_prompt(tokenizer, context, depth=0.5, seed=0).token_ids
    top_k = max(MIN_TOP_K, round(context * PAPER_BUDGET))
    config = hata.HataConfig(top_k=top_k, min_sparse_len=0)
    cache = enable(model, config, max_seq_len=context + steps, observer=keep)
    prompt = torch.tensor([token_ids], device=model.device)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=steps,
        max_new_tokens=steps,
        pad_token_id=0,
    )
    disable(model)
    rows: list[Row] = []
    weights = cache.weights.metadata.get("recipe", "random")
    for num_slots in (size * top_k for size in SIZES):
        rates = {layer: hit_rate(chosen, num_slots) for layer, chosen in selections.items()}
        rates_and_all = {**rates, "all": sum(rates.values()) / len(rates)}
        for layer, rate in rates_and_all.items():
            row = {"weights": weights, "top_k": top_k, "num_slots": num_slots}
            rows.append(row | {"layer": layer, "hit_rate": rate})
    return rows


def hit_rate(selections: list[Tensor], num_slots: int) -> float:
    """Returns the share of the selected rows that a layer's row cache held, after the warm-up.

    Args:
        selections: Of each step, ``[1, 1, num_kv_heads, top_k]``.
        num_slots: Rows of the row cache.
    """
    _, _, num_kv_heads, top_k = selections[0].shape
    seq_len = int(max(indices.max() for indices in selections)) + 1
    num_slots = max(num_slots, top_k)
    pages, rows = (
        torch.zeros(1, length, num_kv_heads, DUMMY_HEAD_DIM) for length in (seq_len, num_slots)
    )
    int32 = torch.int32
    state = (
        *(rows, rows.clone()),
        torch.zeros(1, num_kv_heads, seq_len, dtype=int32),
        torch.full((1, num_kv_heads, num_slots), -1, dtype=int32),
        torch.zeros(1, num_kv_heads, num_slots, dtype=torch.uint8),
        torch.zeros(1, num_kv_heads, dtype=int32),
    )
    tables = (torch.zeros(1, 1, dtype=int32), torch.tensor([seq_len], dtype=int32))
    missing = [
        hata.fetch_rows(indices, pages, pages, *tables, *state).num_missing.sum().item()
        for indices in selections
    ]
    selected = sum(int((indices >= 0).sum()) for indices in selections[WARM_UP:])
    return 1 - sum(missing[WARM_UP:]) / selected
