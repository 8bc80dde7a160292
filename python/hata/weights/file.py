"""Hash weights on disk: one safetensors file, with the model's shape in its metadata.

Where all layers have codes of one length the file holds ``key_weights`` ``[num_layers,
num_kv_heads, head_dim, num_bits]``; else ``key_weights.0``, ``key_weights.1``, ..., one
``[num_kv_heads, head_dim, num_bits]`` a layer, and ``num_bits`` in the metadata lists the layers'
numbers: "32,64,64". The same for ``query_weights``, where they are not the key weights. The tensors
are float32, or float16 in half the space; in memory weights are float32.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hata.checks import check, check_type
from hata.weights.hash_weights import RESERVED, SHAPE_NAMES, HashWeights

_FORMAT = "hata.hash_weights"
_DTYPES = (torch.float32, torch.float16)


def save_weights(
    path: str | os.PathLike[str], weights: HashWeights, *, dtype: torch.dtype = torch.float32
) -> None:
    """Saves hash weights as safetensors, with the model's shape in the file's metadata.

    An existing file is replaced only once the new one is complete.

    Args:
        path: The file to write, in an existing folder.
        weights: The weights; columns that a layer does not use are left out.
        dtype: torch.float32, or torch.float16 to round them to half the space.

    Raises:
        TypeError: ``weights`` is no HashWeights.
        ValueError: The folder does not exist, or the dtype is another one.
    """
    where = "save_weights"
    check_type(isinstance(weights, HashWeights), where, "weights", "be HashWeights", weights)
    path = Path(path)
    check(path.parent.is_dir(), where, "path", "lie in an existing folder", path)
    check(not path.is_dir(), where, "path", "name a file", path)
    rule = f"be one of {', '.join(map(str, _DTYPES))}"
    check(dtype in _DTYPES, where, "dtype", rule, dtype)
    tensors = _tensors("key_weights", weights.key_weights, weights.layer_bits)
    if weights.query_weights is not None:
        tensors |= _tensors("query_weights", weights.query_weights, weights.layer_bits)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    shape = dict(zip(SHAPE_NAMES, _shape(weights), strict=True))
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={**weights.metadata, "format": _FORMAT, **shape})
    partial.replace(path)


def load_weights(
    path: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    num_bits: int | Sequence[int] | None = None,
) -> HashWeights:
    """Loads hash weights that `save_weights` wrote.

    Args:
        path: The file to read.
        num_layers: If given, what the file's number of layers must be; the same for the rest.
        num_kv_heads: KV heads of a layer.
        head_dim: Channels of a head.
        num_bits: Bits of a code, of all layers or of each.

    Returns:
        The weights, on the CPU.

    Raises:
        ValueError: There is no such file, it is no safetensors file with hash weights, its tensors
            do not have the shape that its metadata names, or the shape is not the expected one.
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
    weights = HashWeights.from_layers(
        key_layers,
        _layers("query_weights", tensors) or None,
        {name: text for name, text in metadata.items() if name not in RESERVED},
    )
    shape = dict(zip(SHAPE_NAMES, _shape(weights), strict=True))
    for name, size in shape.items():
        rule = f"be {size} in the metadata"
        check(metadata.get(name) == size, where, name, rule, metadata.get(name))
    expected = (num_layers, num_kv_heads, head_dim, num_bits)
    for (name, size), wanted in zip(shape.items(), expected, strict=True):
        if wanted is not None:
            text = str(wanted) if isinstance(wanted, int) else _bits(wanted)
            check(size == text, where, name, f"be {text}, as asked for", f"{size} in {path}")
    return weights


def _shape(weights: HashWeights) -> tuple[str, ...]:
    """What the metadata says for `SHAPE_NAMES`."""
    return (*map(str, weights.shape[:3]), _bits(weights.layer_bits))


def _bits(layer_bits: Sequence[int]) -> str:
    same = len(set(layer_bits)) == 1
    return str(layer_bits[0]) if same else ",".join(map(str, layer_bits))


def _tensors(name: str, weights: Tensor, layer_bits: Sequence[int]) -> dict[str, Tensor]:
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
