"""Which selectors ``hata recall`` compares."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hata.checks import check
from hata.selectors import (
    ExactSelector,
    HataSelector,
    LokiSelector,
    QuestSelector,
    Selector,
    SparqSelector,
    key_components,
)
from hata.training.captures import CaptureInfo, Captures
from hata.weights import HashWeights, load_weights

_WHERE = "recall"


def trained_selectors(
    info: CaptureInfo, files: Sequence[Path], query_bits: int | None, key_norms: bool | None
) -> list[HataSelector]:
    """Loads hash weights, to be used as they were made unless told otherwise.

    Args:
        info: Of the captures that will be measured; the weights must fit their model.
        files: What `hata.save_weights` wrote.
        query_bits: Overrides what the files say.
        key_norms: Likewise.

    Returns:
        One selector for each file.

    Raises:
        ValueError: A file holds no weights for the model.
    """
    found = []
    for file in files:
        weights = load_weights(file)
        weights.check_model(_WHERE, info.num_layers, info.num_kv_heads, info.head_dim)
        weights = replace(
            weights,
            query_bits=weights.query_bits if query_bits is None else query_bits,
            key_norms=weights.key_norms if key_norms is None else key_norms,
        )
        found.append(HataSelector(weights))
    return found


def baseline_selectors(
    info: CaptureInfo,
    calibration: Captures | None,
    device: torch.device,
    *,
    random_bits: Sequence[int],
    channels: Sequence[int],
    page_size: int,
) -> list[Selector]:
    """Makes what learned weights are compared with.

    Args:
        info: Of the captures that will be measured.
        calibration: Captures of other text, for Loki's components; None leaves Loki out.
        device: Where to fit them.
        random_bits: Bits of untrained codes; each is used as the paper does, with one query bit and
            norms, and with four query bits and none.
        channels: Channels of Loki and SparQ.
        page_size: Of Quest's pages.

    Returns:
        The selectors, without the exact one.

    Raises:
        ValueError: The calibration is another model's, or a number is out of range.
    """
    shape = {name: getattr(info, name) for name in ("num_layers", "num_kv_heads", "head_dim")}
    found: list[Selector] = [ExactSelector(sum_logits=True)]
    for num_bits in random_bits:
        weights = HashWeights.random(**shape, num_bits=num_bits)
        papers = replace(weights, query_bits=1, key_norms=True)
        found += [HataSelector(papers), HataSelector(weights)]
    if calibration is not None:
        same = all(getattr(calibration.info, name) == size for name, size in shape.items())
        rule = f"be captures of a model with {shape}"
        check(same, _WHERE, "--calibration", rule, calibration.info.model)
        layers = (calibration.layer(i).k.flatten(0, 1) for i in range(info.num_layers))
        components = key_components(layers, device)
        found += [LokiSelector(number, components) for number in channels]
    found.append(QuestSelector(page_size))
    return [*found, *(SparqSelector(number) for number in channels)]
