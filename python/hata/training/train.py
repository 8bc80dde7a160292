"""Trains hash weights, some layers at a time; a killed run continues where it was."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hata.checks import check
from hata.training.evaluate import evaluate
from hata.training.parts import Checkpoint, LayerPart, Parts
from hata.training.recipes.fit import Fit, Recipe
from hata.training.source import Source
from hata.weights import HashWeights, save_weights

_WHERE = "train"


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        recipe: What is trained.
        budgets: Values of ``top_k`` that held-out queries are evaluated with.
        memory_limit_gb: GB for the data and the steps of the layers trained at once; None trains
            one layer at a time.
        device: Where.
        checkpoint_every: Steps from one checkpoint, and look at the losses, to the next.

    Raises:
        ValueError: The limit is not positive.
    """

    recipe: Recipe
    budgets: tuple[int, ...]
    memory_limit_gb: float | None
    device: torch.device
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        """Checks the limit."""
        limit = self.memory_limit_gb
        check(limit is None or limit > 0, _WHERE, "memory_limit_gb", "be positive", limit)


def train(
    source: Source,
    heldout: Source | None,
    out: Path,
    options: TrainOptions,
    metadata: dict[str, str],
    *,
    on_step: Callable[[int], None] = lambda layers: None,
) -> list[LayerPart]:
    """Trains every layer and writes the weights.

    Finished layers and a checkpoint lie in the folder ``out`` + ".parts" until the weights are
    written; the same call continues from them, with the same result bit for bit on one machine.

    Args:
        source: What to train on.
        heldout: What to evaluate on; None evaluates nothing.
        out: The safetensors file to write.
        options: How.
        metadata: Strings to save with the weights, beside the recipe's settings.
        on_step: Called after each step with the number of layers that took it.

    Returns:
        What came of each layer.

    Raises:
        ValueError: The settings differ from those of the interrupted run, the memory limit is too
            small for one layer, or a number in data or loss is infinite or NaN.
    """
    recipe = options.recipe
    settings = {
        "recipe": recipe.name,
        **dataclasses.asdict(recipe),
        "budgets": list(options.budgets),
        "shape": list(source.shape),
        **metadata,
    }
    parts = Parts.open(out, settings)
    for layers in _chunks(source, options):
        if not all(parts.has(layer_idx) for layer_idx in layers):
            _train_layers(source, heldout, layers, parts, options, on_step)
        else:
            on_step(len(layers) * recipe.num_steps)
    found = [parts.read(layer_idx) for layer_idx in range(source.num_layers)]
    query_weights = [part.query_weights for part in found if part.query_weights is not None]
    weights = HashWeights(
        torch.stack([part.key_weights for part in found]),
        torch.stack(query_weights) if query_weights else None,
        recipe.query_bits,
        recipe.key_norms,
        {
            **metadata,
            "origin": f"recipe {recipe.name}, seed {recipe.seed}",
            "recipe": recipe.name,
            "seed": str(recipe.seed),
            "config": json.dumps(dataclasses.asdict(recipe)),
        },
        layers=source.captures.info.layers,
    )
    save_weights(out, weights)
    parts.remove()
    return found


def layer_bytes(source: Source, recipe: Recipe) -> int:
    """Estimates the bytes that one layer needs while it is trained."""
    num_sequences, num_queries, group, num_kv_heads, seq_len, head_dim = source.shape
    data = num_sequences * (seq_len + num_queries * group) * head_dim * 4
    return num_kv_heads * (data + recipe.head_bytes(source.shape))


def _chunks(source: Source, options: TrainOptions) -> list[Sequence[int]]:
    """Splits the layers into as few equal chunks as the memory limit allows."""
    layers, at_once = range(source.num_layers), 1
    if options.memory_limit_gb is not None:
        one = layer_bytes(source, options.recipe)
        at_once = int(options.memory_limit_gb * 1e9 / one)
        rule = f"be at least {one / 1e9:.2f}, what one layer needs"
        check(at_once >= 1, _WHERE, "memory_limit_gb", rule, options.memory_limit_gb)
    num_chunks = math.ceil(len(layers) / at_once)
    ends = [math.ceil(i * len(layers) / num_chunks) for i in range(num_chunks + 1)]
    return [layers[start:end] for start, end in itertools.pairwise(ends)]


def _train_layers(
    source: Source,
    heldout: Source | None,
    layers: Sequence[int],
    parts: Parts,
    options: TrainOptions,
    on_step: Callable[[int], None],
) -> None:
    recipe = options.recipe
    data = source.load(layers, options.device)
    # A sequence at a time: what isfinite holds meanwhile is as large as what it looks at.
    finite = all(bool(x.isfinite().all()) for x in (*data.q, *data.k))
    check(finite, _WHERE, f"the captures of layers {list(layers)}", "be finite", "NaN or infinity")
    fit = recipe.fit(data)
    losses = torch.zeros(len(layers), recipe.num_steps, device=options.device)
    optimizer = fit.optimizer()
    if optimizer is not None:
        first = _resume(parts, layers, fit, optimizer, losses)
        on_step(first * len(layers))
        for step in range(first, recipe.num_steps):
            loss = fit.step(data, optimizer, step)
            losses[:, step] = loss.unflatten(0, (len(layers), -1)).mean(1)
            if (step + 1) % options.checkpoint_every == 0:
                _check_losses(layers, losses[:, : step + 1])
                state = Checkpoint(
                    list(layers), step + 1, fit.state_dict(), optimizer.state_dict(), losses
                )
                parts.write_checkpoint(state)
            on_step(len(layers))
        _check_losses(layers, losses)
    key_weights, query_weights = fit.weights()
    del data
    scores = torch.zeros(3, len(layers), len(options.budgets))
    if heldout is not None:
        selected = evaluate(
            heldout.load(layers, options.device),
            key_weights,
            key_weights if query_weights is None else query_weights,
            query_bits=recipe.query_bits,
            key_norms=recipe.key_norms,
            budgets=options.budgets,
        )
        of_heads = torch.stack([selected.lost, selected.lost_exact, selected.recall])
        scores = of_heads.float().unflatten(1, (len(layers), -1)).mean(2)

    def of_layer(weights: Tensor, i: int) -> Tensor:
        return weights.unflatten(0, (len(layers), -1))[i].cpu().contiguous()

    for i, layer_idx in enumerate(layers):
        part = LayerPart(
            of_layer(key_weights, i),
            None if query_weights is None else of_layer(query_weights, i),
            losses[i].cpu(),
            scores[:, i],
        )
        parts.write(layer_idx, part)


def _check_losses(layers: Sequence[int], losses: Tensor) -> None:
    """Checks the losses so far, ``[num_layers, num_steps]``: seldom, since it waits for a GPU."""
    finite = losses.isfinite()
    step = int(finite.all(0).long().argmin())
    bad = (~finite[:, step]).nonzero()[:, 0].tolist()
    what = f"the loss of layers {[layers[i] for i in bad]} at step {step}"
    rule = "stay finite (a smaller learning rate may help)"
    check(not bad, _WHERE, what, rule, losses[bad, step].tolist())


def _resume(
    parts: Parts,
    layers: Sequence[int],
    fit: Fit,
    optimizer: torch.optim.Optimizer,
    losses: Tensor,
) -> int:
    """Takes up the checkpoint of these layers, if there is one, and returns the first step."""
    found = parts.read_checkpoint()
    if found is None or found.layers != list(layers):
        return 0
    fit.load_state_dict(found.fit)
    optimizer.load_state_dict(found.optimizer)
    losses.copy_(found.losses)
    return found.step
