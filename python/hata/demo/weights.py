"""Which hash weights `hata demo` uses."""

from dataclasses import replace

from hata.checks import check
from hata.demo.options import WHERE, DemoOptions
from hata.integrations.model_shape import ModelShape
from hata.pretrained import find_pretrained
from hata.weights import HashWeights, load_weights

RANDOM = "random"
_RANDOM_BITS = 128


def choose_weights(
    options: DemoOptions, model: str, shape: ModelShape, layers: tuple[int, ...]
) -> HashWeights:
    """Loads or draws the weights.

    Args:
        options: ``weights`` names a file, or is "random"; None takes the package's own weights for
            the model, or random ones where it has none, or none with ``num_bits``.
        model: Name of the model.
        shape: Its sizes.
        layers: Its layers that attend to the whole context.

    Returns:
        Weights of these layers alone.

    Raises:
        ValueError: The file holds no weights for a model and codes of these sizes.
    """
    weights = None
    if options.weights is None:
        weights = find_pretrained(model, **shape, layers=layers)
        if weights is not None and options.num_bits not in (None, weights.num_bits):
            weights = None
    elif options.weights != RANDOM:
        weights = load_weights(options.weights)
        weights = weights.for_model(WHERE, **shape, layers=layers)
        num_bits, rule = weights.num_bits, f"hold codes of --num-bits={options.num_bits}"
        check(options.num_bits in (None, num_bits), WHERE, "--weights", rule, num_bits)
    if weights is None:
        num_bits = options.num_bits or _RANDOM_BITS
        weights = HashWeights.random(**shape, num_bits=num_bits, seed=options.seed)
    weights = weights.for_model(WHERE, **shape, layers=layers)
    return replace(weights, query_bits=options.query_bits or weights.query_bits)
