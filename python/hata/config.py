"""The settings of hash-aware top-k attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hata.checks import check, check_int, check_type

# Cached positions of all sequences and KV heads from which one sparse step is the faster one on a
# GPU. On an H100, with top_k 1.56 % of the length and at least 32, the step with the default codes
# overtakes the fastest dense attention here for batch 1 with 8 KV heads (8K tokens), 1 with 32
# (2K) and 8 with 8 (1K), and has overtaken it at twice as many, the fewest measured, for 8 with 32
# (512). 32 bits cross here too, 128 with norms at twice as many.
# Source: bench/results/decode_h100.csv, `python -m bench decode --grid crossover`.
MEASURED_SPARSE_ROWS = 65536


@dataclass(frozen=True)
class HataConfig:
    """How keys are hashed, how positions are selected, and what stays dense.

    ``num_bits`` and ``top_k`` are one int for all layers or one int for each, the dense ones
    included, as ``hata recall --frontier`` writes them.

    Source: HATA, arXiv 2506.02572, sections 3 and 4 (``query_bits=1, key_norms=True`` with 128
    bits is what its authors run); more query bits are this package's own.

    Attributes:
        num_bits: Bits of a key's code, a multiple of 32 from 32 to 256; or one number per layer.
        query_bits: Bits that a query keeps per projection, 1 to 4; 1 is the paper's sign code.
        key_norms: Whether scores are scaled by the key's norm (2 more bytes a token and KV head).
        top_k: Positions that each KV head attends to, at least 1; or one number per layer.
        num_sink: First positions that are always among them, at least 0.
        num_recent: Last positions that are always among them, at least 0;
            ``num_sink + num_recent`` is at most ``top_k``.
        num_dense_layers: Leading layers whose decoding stays dense, at least 0.
        min_sparse_len: Sequences with fewer positions than this, the new ones included, are decoded
            densely, at least 0; 0 is none. None is the length from which a sparse step was measured
            to be the faster one, which `HataCache.min_sparse_len` then says. See
            `hata.decode_attention`.

    Raises:
        TypeError: A value has another type.
        ValueError: A value breaks its rule.
    """

    num_bits: int | tuple[int, ...] = 64
    query_bits: int = 4
    key_norms: bool = False
    top_k: int | tuple[int, ...] = 512
    num_sink: int = 4
    num_recent: int = 16
    num_dense_layers: int = 2
    min_sparse_len: int | None = None

    def __post_init__(self) -> None:
        """Checks every rule."""
        where = "HataConfig"
        for name in ("num_bits", "top_k"):  # lists, as JSON has them, become tuples
            values = getattr(self, name)
            if isinstance(values, Sequence) and not isinstance(values, str):
                check(len(values) > 0, where, name, "have an entry for each layer", values)
                object.__setattr__(self, name, tuple(values))
        for num_bits in _each(self.num_bits):
            check_int(where, "num_bits", num_bits, 32, 256)
            check(num_bits % 32 == 0, where, "num_bits", "be a multiple of 32", num_bits)
        check_int(where, "query_bits", self.query_bits, 1, 4)
        check_type(
            isinstance(self.key_norms, bool), where, "key_norms", "be a bool", self.key_norms
        )
        for top_k in _each(self.top_k):
            check_int(where, "top_k", top_k, 1, 2**31 - 1)
        check_int(where, "num_sink", self.num_sink, 0)
        check_int(where, "num_recent", self.num_recent, 0)
        always, smallest = self.num_sink + self.num_recent, min(_each(self.top_k))
        rule = f"be at most top_k={smallest}"
        check(always <= smallest, where, "num_sink + num_recent", rule, always)
        check_int(where, "num_dense_layers", self.num_dense_layers, 0)
        if self.min_sparse_len is not None:
            check_int(where, "min_sparse_len", self.min_sparse_len, 0)

    def layer_bits(self, num_layers: int) -> tuple[int, ...]:
        """Returns the bits of each layer's codes, ``[num_layers]``.

        Args:
            num_layers: Layers of the model.

        Raises:
            ValueError: ``num_bits`` names another number of layers.
        """
        return _per_layer("num_bits", self.num_bits, num_layers)

    def layer_top_k(self, num_layers: int) -> tuple[int, ...]:
        """Returns the budget of each layer, ``[num_layers]``.

        Args:
            num_layers: Layers of the model.

        Raises:
            ValueError: ``top_k`` names another number of layers.
        """
        return _per_layer("top_k", self.top_k, num_layers)

    def resolve_min_sparse_len(self, batch: int, num_kv_heads: int, device: torch.device) -> int:
        """Returns ``min_sparse_len``, or where it is None the measured one.

        On CUDA that is ``ceil(MEASURED_SPARSE_ROWS / (batch * num_kv_heads))``. Elsewhere it is 0:
        on a CPU a sparse step is the faster one at every length measured, 8 to 14 times at 2K
        tokens, the shortest (bench/results/decode_cpu.csv).

        Args:
            batch: Sequences.
            num_kv_heads: KV heads of a layer.
            device: Where the cache lies.
        """
        if self.min_sparse_len is not None:
            return self.min_sparse_len
        return -(-MEASURED_SPARSE_ROWS // (batch * num_kv_heads)) if device.type == "cuda" else 0


def _each(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _per_layer(name: str, value: int | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        return (value,) * num_layers
    rule = f"be one int or have num_layers={num_layers} entries"
    check(len(value) == num_layers, "HataConfig", name, rule, f"{len(value)} entries")
    return value
