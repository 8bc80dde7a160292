"""Hash weights that come with the package, for models that it knows."""

from importlib.resources import as_file, files

from hata.checks import check
from hata.weights import HashWeights, load_weights

_FILES = {
    path.name.removesuffix(".safetensors"): path
    for path in files("hata.data").iterdir()
    if path.name.endswith(".safetensors")
}


def pretrained_names() -> list[str]:
    """Returns the names of the models that `pretrained_weights` has weights for."""
    return sorted(_FILES)


def find_pretrained(model: str) -> HashWeights | None:
    """Loads hash weights that come with the package, if there are any for this model.

    Args:
        model: Name of the model; what follows one of `pretrained_names` in the name of a file or
            folder, such as "SmolLM2-135M-Instruct.Q4_1", does not matter.

    Returns:
        The weights, on the CPU, or None.
    """
    for name, file in _FILES.items():
        if model == name or model.startswith((f"{name}.", f"{name}-")):
            with as_file(file) as path:
                return load_weights(path)
    return None


def pretrained_weights(model: str) -> HashWeights:
    """Loads hash weights that come with the package.

    They were trained by recipe `hata` (docs/training.md); their metadata says on which texts, and
    with which ``query_bits`` and ``key_norms`` they are to be used.

    Args:
        model: As for `find_pretrained`.

    Returns:
        The weights, on the CPU.

    Raises:
        ValueError: There are none for this model.
    """
    found = find_pretrained(model)
    rule = f"be one of {', '.join(pretrained_names())}"
    check(found is not None, "pretrained_weights", "model", rule, model)
    assert found is not None  # check has made sure of it, for the type checker
    return found
