"""Hash weights on disk: one safetensors file.

Where all layers have codes of one length it holds ``key_weights`` ``[num_layers, num_kv_heads,
head_dim, num_bits]``; else ``key_weights.0``, ``key_weights.1``, ..., one ``[num_kv_heads,
head_dim, num_bits]`` a layer. The same for ``query_weights``, where they are not the key weights.
Tensors are float32, or float16 in half the space; in memory weights are float32. The metadata names
the shape, where ``num_bits`` lists the layers' numbers if they differ ("32,64,64"), ``query_bits``
and ``key_norms``, and where they are not all of a model's, ``layers``.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hata.checks import check, check_type
from hata.outputs import whole_file
from hata.weights.hash_weights import RESERVED, SHAPE_NAMES, HashWeights

_FORMAT = "hata.hash_weights"
_DTYPES = (torch.float32, torch.float16)
_BOOLS = {"true": True, "false": False}


def save_weights(
    path: str | PathLike[str], weights: HashWeights, *, dtype: torch.dtype = torch.float32
) -> None:
    """Saves hash weights as safetensors.

    An existing file is replaced only once the new one is complete.

    Args:
        path: The file to write, in an existing folder.
        weights: The weights; columns that a layer does not use are left out.
        dtype: torch.float32, or torch.float16 to round them to half the space.

    Raises:
        TypeError: ``weights`` is no HashWeights.
        ValueError: The folder does not exist or has no room, or the dtype is another one.
    """
    where = "save_weights"
    check_type(isinstance(weights, HashWeights), where, "weights", "be HashWeights", weights)
    path = Path(path)
    check(path.parent.is_dir(), where, "path", "lie in an existing folder", path)
    check(not path.is_dir(), where, "path", "name a file", path)
    check(dtype in _DTYPES, where, "dtype", f"be one of {_DTYPES}", dtype)
    tensors = _file_tensors("key_weights", weights.key_weights, weights.layer_bits)
    if weights.query_weights is not None:
        tensors |= _file_tensors("query_weights", weights.query_weights, weights.layer_bits)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    metadata = {
        **weights.metadata,
        "format": _FORMAT,
        **_shape_metadata(weights),
        "query_bits": str(weights.query_bits),
        "key_norms": str(weights.key_norms).lower(),
    }
    if weights.layers != tuple(range(weights.shape[0])):
        metadata["layers"] = ",".join(map(str, weights.layers))
    with whole_file(path, where) as partial:
        save_file(tensors, partial, metadata=metadata)


def load_weights(path: str | PathLike[str]) -> HashWeights:
    """Loads hash weights that `save_weights` wrote.

    Files of before ``query_bits`` and ``key_norms`` were always saved are read as 4 and False where
    their metadata names neither, the settings that they were used with by default.

    Args:
        path: The file to read.

    Returns:
        The weights, on the CPU, in float32.

    Raises:
        ValueError: There is no such file, it is no safetensors file with hash weights, or its
            tensors do not have the shape that its metadata names.
    """
    where = "load_weights"
    path = Path(path)
    check(path.is_file(), where, "path", "name an existing file", path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"hata.{where}: path must be a safetensors file, got {path}: {error}"
        ) from error

    kind = metadata.get("format")
    check(kind == _FORMAT, where, "path", f'have "format": "{_FORMAT}" in its metadata', kind)
    tensors = {name: x.float() if x.dtype in _DTYPES else x for name, x in stored.items()}
    key_layers = _layers("key_weights", tensors)
    check(bool(key_layers), where, "path", "hold key_weights", sorted(tensors))
    query_bits = metadata.get("query_bits", "4")
    check(query_bits in ("1", "2", "3", "4"), where, "query_bits", "be 1 to 4", query_bits)
    key_norms = metadata.get("key_norms", "false").lower()
    check(key_norms in _BOOLS, where, "key_norms", "be true or false", key_norms)
    listed = metadata.get("layers", "")
    whole = all(layer_idx.isdecimal() for layer_idx in listed.split(",")) or not listed
    check(whole, where, "layers", "be indices with commas between them", listed)
    weights = HashWeights.from_layers(
        key_layers,
        _layers("query_weights", tensors) or None,
        query_bits=int(query_bits),
        key_norms=_BOOLS[key_norms],
        metadata={name: text for name, text in metadata.items() if name not in RESERVED},
        layers=tuple(map(int, listed.split(","))) if listed else (),
    )
    for name, size in _shape_metadata(weights).items():
        rule = f"be {size} in the metadata"
        check(metadata.get(name) == size, where, name, rule, metadata.get(name))
    return weights


def _shape_metadata(weights: HashWeights) -> dict[str, str]:
    bits = weights.layer_bits
    listed = str(bits[0]) if len(set(bits)) == 1 else ",".join(map(str, bits))
    return dict(zip(SHAPE_NAMES, (*map(str, weights.shape[:3]), listed), strict=True))


def _file_tensors(name: str, weights: Tensor, layer_bits: Sequence[int]) -> dict[str, Tensor]:
    """The file's tensors; clones, since safetensors writes no memory twice."""
    weights = weights.detach().cpu()
    if len(set(layer_bits)) == 1:
        return {name: weights[..., : layer_bits[0]].clone().contiguous()}
    return {
        f"{name}.{i}": weights[i, ..., :bits].clone().contiguous()
        for i, bits in enumerate(layer_bits)
    }


def _layers(name: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """One tensor a layer, in order; none where the file has no such weights."""
    if name in tensors:
        return list(tensors[name])
    numbered = (f"{name}.{i}" for i in range(len(tensors)))
    return [tensors[key] for key in numbered if key in tensors]
