"""Hash weights: the projections whose signs are the bits of a key's code."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hata.checks import check, check_int, check_type

SHAPE_NAMES = ("num_layers", "num_kv_heads", "head_dim", "num_bits")
# What a file's metadata says beside `HashWeights.metadata`.
RESERVED = ("format", *SHAPE_NAMES, "query_bits", "key_norms", "layers")


@dataclass(frozen=True, eq=False)
class HashWeights:
    """The hash weights of a model, and the code format that they were made for.

    Source: HATA, arXiv 2506.02572, section 3; ``query_bits=1, key_norms=True`` with 128 bits is
    what its authors run, more query bits are this package's own (docs/algorithm.md).

    Attributes:
        key_weights: ``[num_layers, num_kv_heads, head_dim, num_bits]``, float32. Bit i of a key's
            code is 1 iff ``k @ key_weights[layer, head, :, i] > 0``, k after the rotary embedding.
        query_weights: The same shape and dtype, for queries; None uses the key weights.
        query_bits: Bits that a query keeps per projection, 1 to 4; 1 is the paper's sign code.
        key_norms: Whether scores are scaled by the key's norm (2 more bytes a token and KV head).
        metadata: Where the weights come from, strings by name; saved with them.
        layer_bits: Bits of each layer's codes, ``[num_layers]``: a layer uses its first columns.
            By default all layers use all of them.
        layers: The model's index of each layer, ``[num_layers]``, ascending. By default they are
            the model's first ones; a model whose other layers attend to a window, or not at all,
            has weights for the rest.

    Raises:
        TypeError: An argument has another type.
        ValueError: A shape, dtype, number of bits or metadata name is not as above.
    """

    key_weights: Tensor = field(repr=False)
    query_weights: Tensor | None = field(default=None, repr=False)
    query_bits: int = 4
    key_norms: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    layer_bits: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    _on_device: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Checks every rule."""
        where = "HashWeights"
        _check_projections(where, "key_weights", self.key_weights)
        num_layers, num_bits = self.key_weights.shape[0], self.num_bits
        check_format(where, num_bits, self.query_bits, self.key_norms)
        if self.query_weights is not None:
            _check_projections(where, "query_weights", self.query_weights)
            shape = list(self.query_weights.shape)
            rule = f"have the shape of key_weights, {list(self.shape)}"
            check(shape == list(self.shape), where, "query_weights", rule, shape)
        for name, text in self.metadata.items():
            strings = isinstance(name, str) and isinstance(text, str)
            check_type(strings, where, "metadata", "hold strings by name", text)
            check(name not in RESERVED, where, "metadata", f"not name any of {RESERVED}", name)
        object.__setattr__(self, "layer_bits", tuple(self.layer_bits) or (num_bits,) * num_layers)
        rule = f"have num_layers={num_layers} entries"
        check(len(self.layer_bits) == num_layers, where, "layer_bits", rule, self.layer_bits)
        for bits in self.layer_bits:
            _check_bits(where, "layer_bits", bits, num_bits)
        layers = tuple(self.layers) or tuple(range(num_layers))
        object.__setattr__(self, "layers", layers)
        ascending = layers[0] >= 0 and list(layers) == sorted(set(layers))
        rule = f"be num_layers={num_layers} ascending indices"
        check(len(layers) == num_layers and ascending, where, "layers", rule, layers)

    @classmethod
    def from_layers(
        cls,
        key_weights: Sequence[Tensor],
        query_weights: Sequence[Tensor] | None = None,
        *,
        query_bits: int = 4,
        key_norms: bool = False,
        metadata: Mapping[str, str] | None = None,
        layers: Sequence[int] = (),
    ) -> "HashWeights":
        """Puts together layers whose codes may have different numbers of bits.

        Args:
            key_weights: Per layer ``[num_kv_heads, head_dim, num_bits]``, float32; num_bits is the
                layer's own.
            query_weights: The same shapes, for queries; None uses the key weights.
            query_bits: Bits that a query keeps per projection.
            key_norms: Whether scores are scaled by the key's norm.
            metadata: Where the weights come from.
            layers: The model's index of each layer; by default they are its first ones.

        Returns:
            The weights; columns that a layer does not use are zeros.

        Raises:
            TypeError: A layer is no tensor.
            ValueError: There is no layer, or their shapes or dtypes are not as above.
        """
        where = "HashWeights.from_layers"
        queries = None if query_weights is None else _pad(where, "query_weights", query_weights)
        keys, bits = _pad(where, "key_weights", key_weights), _widths(key_weights)
        if query_weights is not None:
            rule = f"have the num_bits of key_weights, {bits}"
            got = _widths(query_weights)
            check(got == bits, where, "query_weights", rule, got)
        return cls(keys, queries, query_bits, key_norms, metadata or {}, bits, tuple(layers))

    @classmethod
    def random(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_bits: int | Sequence[int] = 64,
        query_bits: int = 4,
        key_norms: bool = False,
        seed: int = 0,
    ) -> "HashWeights":
        """Draws untrained weights: random orthogonal projections, the same for keys and queries.

        The columns are orthonormal in blocks of ``head_dim``, uniformly distributed (the QR
        decomposition of Gaussian matrices).

        Args:
            num_layers: Layers of the model, at least 1.
            num_kv_heads: KV heads of each layer, at least 1.
            head_dim: Channels of a head, at least 1.
            num_bits: Bits of a code, a multiple of 32 from 32 to 256; or one number for each layer.
            query_bits: Bits that a query keeps per projection.
            key_norms: Whether scores are scaled by the key's norm.
            seed: Seed of the generator; the same seed gives the same weights.

        Returns:
            The weights, on the CPU; ``metadata["origin"]`` names method and seed.

        Raises:
            TypeError: An argument has another type.
            ValueError: An argument is out of range.
        """
        where = "HashWeights.random"
        check_int(where, "num_layers", num_layers, 1)
        check_int(where, "num_kv_heads", num_kv_heads, 1)
        check_int(where, "head_dim", head_dim, 1)
        layer_bits = (num_bits,) * num_layers if isinstance(num_bits, int) else tuple(num_bits)
        for bits in layer_bits:
            _check_bits(where, "num_bits", bits)
        check_int(where, "seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
        longest = max(layer_bits)
        blocks = math.ceil(longest / head_dim)
        shape = (num_layers, num_kv_heads, blocks, head_dim, head_dim)
        # Whatever the defaults are: an engine sets them while it loads a model.
        gaussian = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        q, r = torch.linalg.qr(gaussian)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # makes the decomposition unique
        key_weights = q.transpose(2, 3).flatten(3)[..., :longest].contiguous()
        metadata = {"origin": f"random orthogonal, seed {seed}"}
        return cls(key_weights, None, query_bits, key_norms, metadata, layer_bits)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(num_layers, num_kv_heads, head_dim, num_bits)``."""
        num_layers, num_kv_heads, head_dim, num_bits = self.key_weights.shape
        return num_layers, num_kv_heads, head_dim, num_bits

    @property
    def score_dtype(self) -> torch.dtype:
        """The dtype of `hata.hamming_score`: int32, or float16 with norms."""
        return torch.float16 if self.key_norms else torch.int32

    @property
    def num_bits(self) -> int:
        """Bits of a key's code; those of the longest where the layers' differ."""
        return self.key_weights.shape[3]

    def fits(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        layers: Sequence[int] | None = None,
    ) -> bool:
        """Whether these are weights of a model's layers; takes what `for_model` takes."""
        everything = tuple(range(num_layers))
        needed = everything if layers is None else tuple(layers)
        sizes = self.shape[1:3] == (num_kv_heads, head_dim)
        return sizes and self.layers in (needed, everything)

    def for_model(
        self,
        function: str,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        layers: Sequence[int] | None = None,
    ) -> "HashWeights":
        """Returns the weights of some layers of a model, or raises ValueError.

        Args:
            function: The public function that asks, for the error message.
            num_layers: Layers of the model.
            num_kv_heads: KV heads of each layer.
            head_dim: Channels of a head.
            layers: The model's layers that need weights; None is all of them.

        Returns:
            Weights of these layers alone: themselves, where they are for no others.
        """
        needed = tuple(range(num_layers) if layers is None else layers)
        wanted, got = (num_kv_heads, head_dim), self.shape[1:3]
        rule = f"be for the model's (num_kv_heads, head_dim), {wanted}"
        check(got == wanted, function, "weights", rule, got)
        fits = self.fits(num_layers, num_kv_heads, head_dim, layers)
        rule = f"be for the model's {num_layers} layers" + (
            "" if len(needed) == num_layers else f", or for {list(needed)} of them"
        )
        check(fits, function, "weights", rule, f"layers {list(self.layers)}")
        return self if self.layers == needed else self.part(needed, slice(None))

    def part(self, rows: Sequence[int], kv_heads: slice) -> "HashWeights":
        """Returns the weights of some layers and KV heads: what one device of several needs.

        Args:
            rows: The layers, ascending, as indices of ``key_weights``.
            kv_heads: The KV heads.

        Returns:
            Weights of these alone, as wide as the widest layer of them.
        """
        bits = tuple(self.layer_bits[row] for row in rows)
        chosen = [
            None if t is None else t[list(rows), kv_heads, :, : max(bits)].contiguous()
            for t in (self.key_weights, self.query_weights)
        ]
        assert chosen[0] is not None  # for the type checker
        layers = tuple(self.layers[row] for row in rows)
        return replace(
            self, key_weights=chosen[0], query_weights=chosen[1], layer_bits=bits, layers=layers
        )

    def __deepcopy__(self, memo: object) -> "HashWeights":
        """Returns itself: weights do not change, so copies of a cache share them."""
        return self

    def layer(
        self, layer_idx: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Returns one layer's weights as the operators take them; copies are kept for later calls.

        Args:
            layer_idx: The layer, 0 to ``num_layers - 1``.
            dtype: The dtype of the keys.
            device: The device of the keys.

        Returns:
            Key and query weights, each ``[num_kv_heads, head_dim, num_bits]``, contiguous; num_bits
            is ``layer_bits[layer_idx]``.

        Raises:
            TypeError: ``layer_idx`` is no int.
            ValueError: There is no such layer.
        """
        found = self._on_device.get((layer_idx, dtype, device))
        if found is None:
            check_int("HashWeights.layer", "layer_idx", layer_idx, 0, self.shape[0] - 1)
            used = (layer_idx, ..., slice(self.layer_bits[layer_idx]))
            key_weights = self.key_weights[used].to(device, dtype).contiguous()
            query_weights = key_weights
            if self.query_weights is not None:
                query_weights = self.query_weights[used].to(device, dtype).contiguous()
            found = self._on_device[layer_idx, dtype, device] = (key_weights, query_weights)
        return found


def check_format(function: str, num_bits: int, query_bits: int, key_norms: bool) -> None:
    """Raises TypeError or ValueError unless this is a code format, for a public function."""
    _check_bits(function, "num_bits", num_bits)
    check_int(function, "query_bits", query_bits, 1, 4)
    check_type(isinstance(key_norms, bool), function, "key_norms", "be a bool", key_norms)


def _check_bits(function: str, name: str, bits: int, longest: int = 256) -> None:
    check_int(function, name, bits, 32, longest)
    check(bits % 32 == 0, function, name, "be a multiple of 32", bits)


def _check_projections(function: str, name: str, tensor: object) -> None:
    check_type(isinstance(tensor, Tensor), function, name, "be a tensor", tensor)
    assert isinstance(tensor, Tensor)  # check_type has made sure of it, for the type checker
    rule = "have shape [num_layers, num_kv_heads, head_dim, num_bits]"
    check(tensor.dim() == 4, function, name, rule, list(tensor.shape))
    check(tensor.dtype == torch.float32, function, name, "be torch.float32", tensor.dtype)
    check(bool(tensor.isfinite().all()), function, name, "be finite", "infinite values or NaN")


def _pad(function: str, name: str, layers: Sequence[Tensor]) -> Tensor:
    """Stacks ``[num_kv_heads, head_dim, num_bits]`` tensors, with zero columns up to the widest."""
    tensors = all(isinstance(layer, Tensor) for layer in layers)
    check_type(tensors, function, name, "hold tensors", layers)
    shapes = [list(layer.shape) for layer in layers]
    fits = bool(shapes) and all(len(s) == 3 and s[:2] == shapes[0][:2] for s in shapes)
    rule = "hold [num_kv_heads, head_dim, num_bits] tensors, num_bits alone varying"
    check(fits, function, name, rule, shapes)
    longest = max(_widths(layers))
    return torch.stack([pad(layer, (0, longest - layer.shape[2])) for layer in layers])


def _widths(layers: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(layer.shape[2] for layer in layers)
