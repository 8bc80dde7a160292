"""Hash weights that come with the package, and the budget to use them with."""

import json
from collections.abc import Iterable, Sequence
from importlib.resources import as_file, files
from typing import Any

from hata.checks import check
from hata.config import HataConfig
from hata.weights import HashWeights, load_weights

_DATA = files("hata.pretrained")


def _by_model(end: str) -> dict[str, Any]:
    """The package's files whose names end so, by the name of the model."""
    return {x.name.removesuffix(end): x for x in _DATA.iterdir() if x.name.endswith(end)}


_WEIGHTS = _by_model(".safetensors")
_FRONTIERS = {number: _by_model(f".frontier-{number}.json") for number in (0, 2)}  # dense layers


def pretrained_names() -> list[str]:
    """Returns the names of the models that `pretrained_weights` has weights for."""
    return sorted(_WEIGHTS)


def find_pretrained(
    model: str, num_layers: int, num_kv_heads: int, head_dim: int, layers: Sequence[int]
) -> HashWeights | None:
    """Loads hash weights that come with the package, if there are any for this model.

    Args:
        model: Name of the model; what follows one of `pretrained_names` in the name of a file or
            folder, such as "SmolLM2-135M-Instruct.Q4_1", does not matter.
        num_layers: Layers of the model.
        num_kv_heads: KV heads of each.
        head_dim: Channels of a head.
        layers: The model's layers that attend to the whole context.

    Returns:
        The weights, on the CPU, or None, also for a model of another shape.
    """
    name = _find_name(model, _WEIGHTS)
    if name is None:
        return None
    weights = _load(name)
    return weights if weights.fits(num_layers, num_kv_heads, head_dim, layers) else None


def pretrained_weights(model: str) -> HashWeights:
    """Loads hash weights that come with the package.

    They were trained by recipe `hata` (docs/training.md); their metadata says on which texts.

    Args:
        model: As for `find_pretrained`.

    Returns:
        The weights, on the CPU.

    Raises:
        ValueError: There are none for this model.
    """
    return _load(_name("pretrained_weights", model, _WEIGHTS))


def pretrained_frontier(model: str, num_dense_layers: int = 2) -> dict[str, Any]:
    """Loads budgets of each layer's own, chosen with the package's weights for a model.

    They are chosen on training text, by what each layer's sparse attention does to the model's
    output (docs/eval.md).

    Args:
        model: As for `find_pretrained`.
        num_dense_layers: Leading layers that stay dense, 0 or 2.

    Returns:
        What ``hata eval --choose-on`` wrote: "model", "context", "commit", "command" and others,
        and "levels", cheapest first; each has "bytes_per_step" (of a layer and KV head), "uniform"
        and "per_layer", whose "top_k" `HataConfig` takes, and whose mean over the sparse layers is
        that of "uniform".

    Raises:
        ValueError: There is none for this model, or for so many dense layers.
    """
    return _frontier("pretrained_frontier", model, num_dense_layers)


def pretrained_config(model: str, top_k: int = 512, num_dense_layers: int = 2) -> HataConfig:
    """Returns the settings that go with `pretrained_weights`, and budgets of each layer's own.

    ``num_sink`` and ``num_recent`` are those that the weights were trained with. Every layer has a
    ``top_k`` of its own, those that change the model's output least while the layers together read
    no more than with one ``top_k`` for all.

    Args:
        model: As for `find_pretrained`.
        top_k: Positions that each KV head attends to, on average over the sparse layers; one of
            `pretrained_frontier`'s.
        num_dense_layers: Leading layers that stay dense, 0 or 2.

    Returns:
        The settings; `dataclasses.replace` changes one.

    Raises:
        ValueError: There is no frontier for this model and number of dense layers, or it has no
            such ``top_k``.
    """
    where = "pretrained_config"
    frontier, weights = _frontier(where, model, num_dense_layers), pretrained_weights(model)
    levels = {level["uniform"]["top_k"]: level["per_layer"] for level in frontier["levels"]}
    check(top_k in levels, where, "top_k", f"be one of {', '.join(map(str, levels))}", top_k)
    return HataConfig(
        top_k=tuple(levels[top_k]["top_k"]),
        num_sink=int(weights.metadata["num_sink"]),
        num_recent=int(weights.metadata["num_recent"]),
        num_dense_layers=num_dense_layers,
    )


def _frontier(function: str, model: str, num_dense_layers: int) -> dict[str, Any]:
    rule = f"be one of {', '.join(map(str, _FRONTIERS))}"
    check(num_dense_layers in _FRONTIERS, function, "num_dense_layers", rule, num_dense_layers)
    found = _FRONTIERS[num_dense_layers]
    frontier: dict[str, Any] = json.loads(found[_name(function, model, found)].read_text())
    return frontier


def _load(name: str) -> HashWeights:
    with as_file(_WEIGHTS[name]) as path:
        return load_weights(path)


def _find_name(model: str, names: Iterable[str]) -> str | None:
    """Returns the name in the package that a model goes by."""
    return next((x for x in names if model == x or model.startswith((f"{x}.", f"{x}-"))), None)


def _name(function: str, model: str, names: Iterable[str]) -> str:
    """Returns the same for a public function, which has to be given such a model."""
    name = _find_name(model, names)
    check(name is not None, function, "model", f"be one of {', '.join(sorted(names))}", model)
    assert name is not None  # check has made sure of it, for the type checker
    return name
