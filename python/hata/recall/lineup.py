"""Which selectors ``hata recall`` compares."""

from dataclasses import replace

from hata.checks import check
from hata.recall.options import WHERE, RecallOptions
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


def trained_selectors(info: CaptureInfo, options: RecallOptions) -> list[HataSelector]:
    """Loads the files of hash weights, to be used as they were made unless told otherwise.

    Raises:
        ValueError: A file holds no weights for the model that was captured.
    """
    found = []
    for file in options.weights:
        weights = load_weights(file)
        sizes = (len(info.layer_types), info.num_kv_heads, info.head_dim)
        weights = weights.for_model(WHERE, *sizes, layers=info.layers)
        bits, norms = options.query_bits, options.key_norms
        bits = weights.query_bits if bits is None else bits
        norms = weights.key_norms if norms is None else norms
        found.append(HataSelector(replace(weights, query_bits=bits, key_norms=norms)))
    return found


def baseline_selectors(
    info: CaptureInfo, calibration: Captures | None, options: RecallOptions
) -> list[Selector]:
    """Makes what learned weights are compared with, beside the exact selector.

    Random codes are used as the paper does, with one query bit and norms, and with four query bits
    and none. Without a calibration Loki is left out: its components are of other text.

    Raises:
        ValueError: The calibration is another model's, or a number is out of range.
    """
    shape = {name: getattr(info, name) for name in ("num_layers", "num_kv_heads", "head_dim")}
    of_model = {**shape, "layers": info.layers}
    channels = options.channels or (info.head_dim // 4, info.head_dim // 2)
    found: list[Selector] = [ExactSelector(sum_logits=True)]
    for num_bits in options.random_bits:
        weights = HashWeights.random(**shape, num_bits=num_bits)
        papers = replace(weights, query_bits=1, key_norms=True)
        found += [HataSelector(papers), HataSelector(weights)]
    if calibration is not None:
        same = all(getattr(calibration.info, name) == size for name, size in of_model.items())
        rule = f"be captures of a model with {of_model}"
        check(same, WHERE, "--calibration", rule, calibration.info.model)
        layers = (calibration.layer(i).k.flatten(0, 1) for i in range(info.num_layers))
        components = key_components(layers, options.torch_device())
        found += [LokiSelector(number, components) for number in channels]
    found.append(QuestSelector(options.page_size))
    return [*found, *(SparqSelector(number) for number in channels)]
