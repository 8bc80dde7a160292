"""Which hash weights `hata demo` uses."""

import dataclasses
from pathlib import Path

from hata.config import HataConfig
from hata.demo.options import DemoOptions
from hata.integrations.model_shape import ModelShape
from hata.pretrained import find_pretrained
from hata.weights import HashWeights, load_weights

RANDOM = "random"
_RANDOM_BITS = 128


def choose_weights(options: DemoOptions, model: str, shape: ModelShape) -> HashWeights:
    """Loads or draws the weights.

    Args:
        options: ``weights`` names a file, or is "random"; None takes the package's own weights for
            the model, or random ones where it has none, or none with ``num_bits``.
        model: Name of the model.
        shape: Its sizes.

    Raises:
        ValueError: The file holds no weights for a model and codes of these sizes.
    """
    if options.weights is None:
        weights = find_pretrained(model)
        if weights is not None and options.num_bits in (None, weights.num_bits):
            return weights
    elif options.weights != RANDOM:
        return load_weights(Path(options.weights), **shape, num_bits=options.num_bits)
    num_bits = options.num_bits or _RANDOM_BITS
    return HashWeights.random(**shape, num_bits=num_bits, seed=options.seed)


def config_for(options: DemoOptions, weights: HashWeights) -> HataConfig:
    """Returns hata's settings: what the weights were trained for, and what the options say."""
    trained_for = weights.metadata.get("query_bits")
    query_bits = options.query_bits or (int(trained_for) if trained_for else None)
    return dataclasses.replace(
        options.config(),
        num_bits=weights.num_bits,
        key_norms=weights.metadata.get("key_norms") == "true",
        **({"query_bits": query_bits} if query_bits else {}),
    )
