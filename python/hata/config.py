"""The settings of hash-aware top-k attention."""

from dataclasses import dataclass

from hata.checks import check, check_int, check_type


@dataclass(frozen=True)
class HataConfig:
    """How keys are hashed, how positions are selected, and which layers stay dense.

    Source: HATA, arXiv 2506.02572, sections 3 and 4 (``query_bits=1, key_norms=True`` with 128
    bits is what its authors run); more query bits are this package's own.

    Attributes:
        num_bits: Bits of a key's code, a multiple of 32 from 32 to 256.
        query_bits: Bits that a query keeps per projection, 1 to 4; 1 is the paper's sign code.
        key_norms: Whether scores are scaled by the key's norm (2 more bytes a token and KV head).
        top_k: Positions that each KV head attends to, at least 1.
        num_sink: First positions that are always among them, at least 0.
        num_recent: Last positions that are always among them, at least 0;
            ``num_sink + num_recent`` is at most ``top_k``.
        num_dense_layers: Leading layers whose decoding stays dense, at least 0.

    Raises:
        TypeError: A value has another type.
        ValueError: A value breaks its rule.
    """

    num_bits: int = 64
    query_bits: int = 4
    key_norms: bool = False
    top_k: int = 512
    num_sink: int = 4
    num_recent: int = 16
    num_dense_layers: int = 2

    def __post_init__(self) -> None:
        """Checks every rule."""
        where = "HataConfig"
        check_int(where, "num_bits", self.num_bits, 32, 256)
        rule = "be a multiple of 32"
        check(self.num_bits % 32 == 0, where, "num_bits", rule, self.num_bits)
        check_int(where, "query_bits", self.query_bits, 1, 4)
        check_type(
            isinstance(self.key_norms, bool), where, "key_norms", "be a bool", self.key_norms
        )
        check_int(where, "top_k", self.top_k, 1, 2**31 - 1)
        check_int(where, "num_sink", self.num_sink, 0)
        check_int(where, "num_recent", self.num_recent, 0)
        always = self.num_sink + self.num_recent
        rule = f"be at most top_k={self.top_k}"
        check(always <= self.top_k, where, "num_sink + num_recent", rule, always)
        check_int(where, "num_dense_layers", self.num_dense_layers, 0)

    @property
    def num_words(self) -> int:
        """int32 words of a key's code."""
        return self.num_bits // 32
