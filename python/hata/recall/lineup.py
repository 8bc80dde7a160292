"""Which selectors ``hata recall`` and ``hata eval`` compare."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hata.checks import check
from hata.recall.options import WHERE, LineupOptions
from hata.selectors import (
    ExactSelector,
    H2oSelector,
    HashAttentionSelector,
    HataSelector,
    InfinigenSelector,
    LokiSelector,
    MagicpigSelector,
    QuestSelector,
    RabitqSelector,
    Selector,
    SnapkvSelector,
    SparqSelector,
    StreamingSelector,
    VattentionSelector,
    fit_hash_networks,
    key_components,
)
from hata.training.captures import Captures
from hata.weights import HashWeights, load_weights

_INFINIGEN_CHANNELS = 0.3  # of head_dim, as in its paper


@dataclass(frozen=True)
class SelectedLayers:
    """The layers of a model that selectors choose for.

    Attributes:
        num_model_layers: Layers of the model.
        layers: The model's index of each layer that attends to the whole context.
        num_kv_heads: KV heads of each.
        head_dim: Channels of a head.
    """

    num_model_layers: int
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int


def trained_selectors(shape: SelectedLayers, options: LineupOptions) -> list[HataSelector]:
    """Loads the files of hash weights, to be used as they were made unless told otherwise.

    Raises:
        ValueError: A file holds no weights for the model.
    """
    found = []
    for file in options.weights:
        weights = load_weights(file)
        sizes = (shape.num_model_layers, shape.num_kv_heads, shape.head_dim)
        weights = weights.for_model(WHERE, *sizes, layers=shape.layers)
        bits, norms = options.query_bits, options.key_norms
        bits = weights.query_bits if bits is None else bits
        norms = weights.key_norms if norms is None else norms
        found.append(HataSelector(replace(weights, query_bits=bits, key_norms=norms)))
    return found


def baseline_selectors(
    shape: SelectedLayers,
    calibration: Captures | None,
    options: LineupOptions,
    device: torch.device,
    learned: Sequence[HataSelector],
) -> list[Selector]:
    """Makes what learned weights are compared with, beside the exact selector.

    Random codes are used as the paper does, with one query bit and norms, and with four query bits
    and none. Without a calibration Loki is left out: its components are of other text. vAttention
    chooses its one half by exact attention, and by each of the learned weights.

    Raises:
        ValueError: The calibration is another model's, or a number is out of range.
    """
    sizes: dict[str, Any] = {
        "num_layers": len(shape.layers),
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
    }
    of_model = {**sizes, "layers": shape.layers}
    channels = options.channels or (shape.head_dim // 4, shape.head_dim // 2)
    found: list[Selector] = [ExactSelector(sum_logits=True)]
    for num_bits in options.random_bits:
        weights = HashWeights.random(**sizes, num_bits=num_bits)
        papers = replace(weights, query_bits=1, key_norms=True)
        found += [HataSelector(papers), HataSelector(weights)]
    if calibration is not None:
        same = all(getattr(calibration.info, name) == size for name, size in of_model.items())
        rule = f"be captures of a model with {of_model}"
        check(same, WHERE, "--calibration", rule, calibration.info.model)
        layers = (calibration.layer(i).k.flatten(0, 1) for i in range(len(shape.layers)))
        components = key_components(layers, device)
        found += [LokiSelector(number, components) for number in channels]
        if options.hash_attention_steps:
            queries_and_keys = (
                (x.q.unflatten(2, (shape.num_kv_heads, -1)), x.k, x.positions, x.softmax)
                for x in map(calibration.layer, range(len(shape.layers)))
            )
            steps = options.hash_attention_steps
            networks = fit_hash_networks(queries_and_keys, device, num_steps=steps)
            found.append(HashAttentionSelector(networks))
    found += [StreamingSelector(), H2oSelector(), SnapkvSelector()]
    found.append(QuestSelector(options.page_size))
    found += [SparqSelector(number) for number in channels]
    found.append(InfinigenSelector(round(_INFINIGEN_CHANNELS * shape.head_dim)))
    found += [MagicpigSelector(), RabitqSelector()]
    return found + [VattentionSelector(top) for top in (ExactSelector(), *learned)]
