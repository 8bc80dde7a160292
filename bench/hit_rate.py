"""How many of the rows that a model selects its last steps had selected: the row cache's hit rate.

The model reads prose and then goes on greedily; each sparse layer's selections of those steps are
then handed to `hata.fetch_rows`, once for each size of the row cache, which starts empty. The first
steps, which fill it, are not counted.

A prefetch would have to guess what is missing. ``guessed`` is the share of a layer's selection that
its query would also select if it were made of the hidden states before the previous layer, as
InfiniGen guesses (arXiv 2406.19707); ``guessed_of_missing`` is the same of the rows that the row
cache lacks, which alone are worth guessing.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from typer import Option

import hata
from hata.checks import check_int
from hata.commands.options import with_options
from hata.device import ModelFolder
from hata.ops import plane_weight_sum
from hata.provenance import origin

from .cases import MIN_TOP_K, PAPER_BUDGET
from .options import Output, check_output, repeated
from .report import RESULTS, Report, Row

CONTEXTS = [2048, 4096, 7936]
WARM_UP = 8  # steps
SIZES = (1, 2, 4, 8)  # slots for each position that a step selects
DUMMY_HEAD_DIM = 8  # which rows are copied says nothing about what is in them
COLUMNS = ["model", "weights", "context", "steps", "top_k", "num_slots", "layer", "hit_rate"]
COLUMNS += ["guessed", "guessed_of_missing"]
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
    weights: Annotated[
        Path | None, Option(help="The model's hash weights; by default the package's.")
    ] = None

    def words(self) -> list[str]:
        """Returns the options that decide what a row holds, as they are typed."""
        return [
            *(["--model", self.model.name] if self.model else []),
            *(["--weights", self.weights.name] if self.weights else []),
            *repeated("--context", map(str, self.context)),
            *("--steps", str(self.steps)),
        ]


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
    command = " ".join(["python -m bench hit-rate", *options.words()])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(folder, device, dtype)
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        for context in progress.track(contexts, description="contexts"):
            rows = measure(model, tokenizer, context, options.steps, options.weights)
            for row in rows:
                report.add({"model": folder.name, "context": context, "steps": options.steps} | row)
    whole = [row for row in report.rows if row["layer"] == "all"]
    report.rows = whole
    report.show(Console(), SHOWN, "Hit rate of the row cache", "greedy decoding after prose")
    print(f"rows in {path}")


def measure(
    model: Any, tokenizer: Any, context: int, steps: int, weights: Path | None = None
) -> list[Row]:
    """Returns the columns of each size of the row cache and layer."""
    from hata.demo.prompt import build_prompt
    from hata.integrations.transformers import disable, enable

    selections: dict[int, list[Tensor]] = {}
    guesses: dict[int, list[Tensor]] = {}

    def keep(layer_idx: int, q: Tensor, cache: hata.HataCache, indices: Tensor, n: Tensor) -> None:
        selections.setdefault(layer_idx, []).append(indices.cpu().clone())
        guessed = select(early[model_layers[layer_idx]], cache, layer_idx)
        guesses.setdefault(layer_idx, []).append(guessed.cpu())

    token_ids = build_prompt(tokenizer, context, depth=0.5, seed=0).token_ids
    top_k = max(MIN_TOP_K, round(context * PAPER_BUDGET))
    config = hata.HataConfig(top_k=top_k, min_sparse_len=0)
    settings = {"weights": weights, "max_seq_len": context + steps, "observer": keep}
    cache = enable(model, config, **settings)
    model_layers = cache.hata_layers  # an observer is told numbers of the cache's layers
    early, hooks = early_queries(model)
    prompt = torch.tensor([token_ids], device=model.device)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=steps,
        max_new_tokens=steps,
        pad_token_id=0,
    )
    for hook in hooks:
        hook.remove()
    disable(model)
    rows: list[Row] = []
    recipe = cache.weights.metadata.get("recipe", "random")
    for num_slots in (size * top_k for size in SIZES):
        rates = {
            layer: hit_rates(chosen, guesses[layer], num_slots)
            for layer, chosen in selections.items()
        }
        means = torch.tensor(list(rates.values())).nanmean(0).tolist()
        of_model = {model_layers[layer]: shares for layer, shares in rates.items()}
        for layer, shares in {**of_model, "all": means}.items():
            row = {"weights": recipe, "top_k": top_k, "num_slots": num_slots, "layer": layer}
            rows.append(row | dict(zip(COLUMNS[-3:], shares, strict=True)))
    return rows


def early_queries(model: Any) -> tuple[dict[int, Tensor], list[RemovableHandle]]:
    """Makes each layer's query of one token from what the previous layer is given.

    Returns:
        The queries ``[1, 1, num_heads, head_dim]`` of the last token by layer, as soon as there are
        any, and the hooks that make them.
    """
    queries: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}  # of each layer: the last token's hidden state

    def note(layer_idx: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs[layer_idx] = hidden[:, -1:]

    def guess(layer_idx: int, norm: Any, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cos, sin = kwargs["position_embeddings"]  # those of this layer: others may rotate otherwise
        if cos.shape[1] > 1:  # the prompt
            return
        q = module.q_proj(norm(inputs[layer_idx - 1])).unflatten(-1, (-1, module.head_dim))
        if hasattr(module, "q_norm"):
            q = module.q_norm(q)
        queries[layer_idx], _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)

    hooks = []
    for layer_idx, layer in enumerate(model.model.layers):
        calls = [(layer, partial(note, layer_idx))]
        if layer_idx > 0:
            calls.append((layer.self_attn, partial(guess, layer_idx, layer.input_layernorm)))
        hooks += [
            module.register_forward_pre_hook(call, with_kwargs=True) for module, call in calls
        ]
    return queries, hooks


def select(q: Tensor, cache: hata.HataCache, layer_idx: int) -> Tensor:
    """Returns the positions that a query selects, ``[1, 1, num_kv_heads, top_k]``."""
    weights = cache.weights
    query_weights = weights.layer(layer_idx, cache.dtype, cache.device)[1]
    return hata.score_select(
        hata.encode_query(q, query_weights, query_bits=weights.query_bits),
        cache.code_cache[layer_idx],
        cache.norm_cache[layer_idx],
        cache.block_table,
        cache.cache_seqlens,
        weight_sum=plane_weight_sum(weights.query_bits, q.shape[2] // cache.num_kv_heads),
        **cache.layer_budgets[layer_idx]._asdict(),
        num_sink=cache.config.num_sink,
        num_recent=cache.config.num_recent,
    )[0]


def hit_rates(
    selections: list[Tensor], guesses: list[Tensor], num_slots: int
) -> tuple[float, float, float]:
    """Returns what a layer's row cache held, after the warm-up, and what was guessed.

    Args:
        selections: Of each step, ``[1, 1, num_kv_heads, top_k]``.
        guesses: The same shapes.
        num_slots: Rows of the row cache.

    Returns:
        The shares of the selected rows that the row cache held and that were guessed, and the share
        of those that it lacked that were guessed; NaN where it lacked none.
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
    counts = torch.zeros(4)  # selected, missing, guessed, missing and guessed
    for step, (indices, guess) in enumerate(zip(selections, guesses, strict=True)):
        fetched = hata.fetch_rows(indices, pages, pages, *tables, *state)
        if step < WARM_UP:
            continue
        selected = indices >= 0
        missing = torch.zeros_like(selected)
        for h, listed in enumerate(fetched.missing[0, 0]):
            missing[0, 0, h, listed[listed >= 0].long()] = True
        guessed = selected & (indices[..., None] == guess[..., None, :]).any(-1)
        counts += torch.stack([t.sum() for t in (selected, missing, guessed, missing & guessed)])
    all_selected, all_missing, all_guessed, both = counts.tolist()
    guessed_of_missing = both / all_missing if all_missing else math.nan
    return 1 - all_missing / all_selected, all_guessed / all_selected, guessed_of_missing
