"""Hash weights: the projections whose signs are the bits of a key's code."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hata.checks import check, check_int, check_type

_FORMAT = "hata.hash_weights"
_SHAPE = ("num_layers", "num_kv_heads", "head_dim", "num_bits")
_RESERVED = ("format", *_SHAPE)


@dataclass(frozen=True, eq=False)
class HashWeights:
    """The hash weights of a model (HATA, arXiv 2506.02572, section 3).

    Attributes:
        key_weights: ``[num_layers, num_kv_heads, head_dim, num_bits]``, float32. Bit i of a key's
            code is 1 iff ``k @ key_weights[layer, head, :, i] > 0``, k after the rotary embedding.
        query_weights: The same shape and dtype, for queries; None uses the key weights.
        metadata: Where the weights come from, strings by name; saved with them.

    Raises:
        TypeError: An argument has another type.
        ValueError: A shape, dtype or metadata name is not as above.
    """

    key_weights: Tensor = field(repr=False)
    query_weights: Tensor | None = field(default=None, repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)
    _layers: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Checks every rule."""
        where = "HashWeights"
        for name, tensor in (
            ("key_weights", self.key_weights),
            ("query_weights", self.query_weights),
        ):
            if tensor is None and name == "query_weights":
                continue
            check_type(isinstance(tensor, Tensor), where, name, "be a tensor", tensor)
            assert tensor is not None  # check_type has made sure of it, for the type checker
            check(
                tensor.dim() == 4,
                where,
                name,
                f"have shape [{', '.join(_SHAPE)}]",
                list(tensor.shape),
            )
            check(tensor.dtype == torch.float32, where, name, "be torch.float32", tensor.dtype)
            finite = bool(tensor.isfinite().all())
            check(finite, where, name, "be finite", "infinite values or NaN")
        rule = "be a multiple of 32 from 32 to 256"
        num_bits = self.num_bits
        check(num_bits % 32 == 0 and 32 <= num_bits <= 256, where, "num_bits", rule, num_bits)
        if self.query_weights is not None:
            shape = list(self.query_weights.shape)
            rule = f"have the shape of key_weights, {list(self.shape)}"
            check(shape == list(self.shape), where, "query_weights", rule, shape)
        for name, text in self.metadata.items():
            strings = isinstance(name, str) and isinstance(text, str)
            check_type(strings, where, "metadata", "hold strings by name", text)
            check(name not in _RESERVED, where, "metadata", f"not name any of {_RESERVED}", name)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(num_layers, num_kv_heads, head_dim, num_bits)``."""
        num_layers, num_kv_heads, head_dim, num_bits = self.key_weights.shape
        return num_layers, num_kv_heads, head_dim, num_bits

    @property
    def num_bits(self) -> int:
        """Bits of a key's code."""
        return self.key_weights.shape[3]

    @classmethod
    def random(
        cls, *, num_layers: int, num_kv_heads: int, head_dim: int, num_bits: int, seed: int = 0
    ) -> "HashWeights":
        """Draws untrained weights: random orthogonal projections, the same for keys and queries.

        The columns are orthonormal in blocks of ``head_dim``, uniformly distributed (the QR
        decomposition of Gaussian matrices).

        Args:
            num_layers: Layers of the model, at least 1.
            num_kv_heads: KV heads of each layer, at least 1.
            head_dim: Channels of a head, at least 1.
            num_bits: Bits of a code, a multiple of 32 from 32 to 256.
            seed: Seed of the generator; the same seed gives the same weights.

        Returns:
            The weights, on the CPU; ``metadata["origin"]`` names method and seed.

        Raises:
            TypeError: An argument is no int.
            ValueError: An argument is out of range.
        """
        where = "HashWeights.random"
        check_int(where, "num_layers", num_layers, 1)
        check_int(where, "num_kv_heads", num_kv_heads, 1)
        check_int(where, "head_dim", head_dim, 1)
        check_int(where, "num_bits", num_bits, 32, 256)
        check_int(where, "seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
        blocks = math.ceil(num_bits / head_dim)
        shape = (num_layers, num_kv_heads, blocks, head_dim, head_dim)
        q, r = torch.linalg.qr(torch.randn(shape, generator=generator))
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # makes the decomposition unique
        key_weights = q.transpose(2, 3).flatten(3)[..., :num_bits].contiguous()
        return cls(key_weights, metadata={"origin": f"random orthogonal, seed {seed}"})

    def layer(
        self, layer_idx: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Returns one layer's weights as the operators take them; copies are kept for later calls.

        Args:
            layer_idx: The layer, 0 to ``num_layers - 1``.
            dtype: The dtype of the keys.
            device: The device of the keys.

        Returns:
            Key and query weights, each ``[num_kv_heads, head_dim, num_bits]``, contiguous.

        Raises:
            TypeError: ``layer_idx`` is no int.
            ValueError: There is no such layer.
        """
        found = self._layers.get((layer_idx, dtype, device))
        if found is None:
            check_int("HashWeights.layer", "layer_idx", layer_idx, 0, self.shape[0] - 1)
            key_weights = self.key_weights[layer_idx].to(device, dtype).contiguous()
            query_weights = key_weights
            if self.query_weights is not None:
                query_weights = self.query_weights[layer_idx].to(device, dtype).contiguous()
            found = self._layers[layer_idx, dtype, device] = (key_weights, query_weights)
        return found


def save_weights(path: str | os.PathLike[str], weights: HashWeights) -> None:
    """Saves hash weights as safetensors, with the model's shape in the file's metadata.

    An existing file is replaced only once the new one is complete.

    Args:
        path: The file to write, in an existing folder.
        weights: The weights.

    Raises:
        TypeError: ``weights`` is no HashWeights.
        ValueError: The folder does not exist.
    """
    where = "save_weights"
    check_type(isinstance(weights, HashWeights), where, "weights", "be HashWeights", weights)
    path = Path(path)
    check(path.parent.is_dir(), where, "path", "lie in an existing folder", path)
    check(not path.is_dir(), where, "path", "name a file", path)
    tensors = {"key_weights": weights.key_weights.detach().cpu().contiguous()}
    if weights.query_weights is not None:
        tensors["query_weights"] = weights.query_weights.detach().cpu().clone().contiguous()
    shape = {name: str(size) for name, size in zip(_SHAPE, weights.shape, strict=True)}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={**weights.metadata, "format": _FORMAT, **shape})
    partial.replace(path)


def load_weights(
    path: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    num_bits: int | None = None,
) -> HashWeights:
    """Loads hash weights that `save_weights` wrote.

    Args:
        path: The file to read.
        num_layers: If given, what the file's number of layers must be; the same for the rest.
        num_kv_heads: KV heads of a layer.
        head_dim: Channels of a head.
        num_bits: Bits of a code.

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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"hata.{where}: path must be a safetensors file, got {path}: {error}"
        ) from error

    kind = metadata.get("format")
    check(kind == _FORMAT, where, "path", f'have "format": "{_FORMAT}" in its metadata', kind)
    check("key_weights" in tensors, where, "path", "hold key_weights", sorted(tensors))
    weights = HashWeights(
        tensors["key_weights"],
        tensors.get("query_weights"),
        {name: text for name, text in metadata.items() if name not in _RESERVED},
    )
    for name, size in zip(_SHAPE, weights.shape, strict=True):
        check(
            metadata.get(name) == str(size),
            where,
            name,
            f"be {size} in the metadata",
            metadata.get(name),
        )
    expected = (num_layers, num_kv_heads, head_dim, num_bits)
    for name, size, wanted in zip(_SHAPE, weights.shape, expected, strict=True):
        if wanted is not None:
            check(size == wanted, where, name, f"be {wanted}, as asked for", f"{size} in {path}")
    return weights
