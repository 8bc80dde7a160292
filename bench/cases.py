"""The shapes and code settings that the benchmarks measure, and the bytes that each must move."""

from dataclasses import dataclass

import torch

import hata

NUM_SINK = 4
NUM_RECENT = 16
MIN_TOP_K = 32  # room for the sink and recent positions in short sequences
CONTIGUOUS = 0  # page_size of a case whose sequences are one page each
PAPER_BUDGET = 1 / 64  # 1.56 % of the sequence, the budget of HATA's efficiency runs


@dataclass(frozen=True)
class Shape:
    """One layer of a model while it decodes ``q_len`` tokens of each sequence.

    Attributes:
        seq_len: Tokens of each sequence, the new ones included.
        capacity: Tokens that block table, workspace and CUDA graph are made for; 0: ``seq_len``.
        budget: Share of a sequence that is selected.
        dtype: Of queries, new keys and new values.
        kv_cache_dtype: Of cached ones; None: ``dtype``.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    seq_len: int
    head_dim: int = 128
    q_len: int = 1
    capacity: int = 0
    budget: float = PAPER_BUDGET
    dtype: torch.dtype = torch.bfloat16
    kv_cache_dtype: torch.dtype | None = None

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def heads(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}"

    @property
    def top_k(self) -> int:
        return max(MIN_TOP_K, round(self.seq_len * self.budget))

    @property
    def max_seq_len(self) -> int:
        return self.capacity or self.seq_len

    @property
    def token_bytes(self) -> int:
        """Size of one position's keys and values in all KV heads."""
        dtype = self.kv_cache_dtype or self.dtype
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        """Size of the live keys and values: what dense attention reads."""
        return self.batch * self.seq_len * self.token_bytes

    @property
    def row_bytes(self) -> int:
        """Size of the selected K and V rows: what attention over the selection reads."""
        return self.batch * self.q_len * self.top_k * self.token_bytes

    def __str__(self) -> str:
        """Returns batch, heads and length, "8 x 32/8 x 128K", and what is unusual."""
        parts = [f"{self.batch} x {self.heads} x {tokens(self.seq_len)}"]
        if self.capacity:
            parts.append(f"capacity {tokens(self.capacity)}")
        if self.head_dim != 128:
            parts.append(f"head_dim {self.head_dim}")
        if self.q_len != 1:
            parts.append(f"q_len {self.q_len}")
        if self.budget != PAPER_BUDGET:
            parts.append(f"top_k {self.top_k}")
        if self.dtype == torch.float16:
            parts.append("float16")
        if self.kv_cache_dtype is not None:
            parts.append(f"{name_of(self.kv_cache_dtype)} cache")
        return ", ".join(parts)


def name_of(dtype: torch.dtype) -> str:
    """Returns the dtype's name in torch."""
    return str(dtype).removeprefix("torch.")


def tokens(count: int) -> str:
    """Returns 512, 128K or 1M for numbers of tokens."""
    if count % (1 << 20) == 0:
        return f"{count >> 20}M"
    return f"{count >> 10}K" if count % (1 << 10) == 0 else str(count)


@dataclass(frozen=True)
class CodeConfig:
    """How keys and queries are hashed."""

    name: str
    num_bits: int
    query_bits: int
    key_norms: bool

    @property
    def num_words(self) -> int:
        return self.num_bits // 32

    def weight_sum(self, shape: Shape) -> int:
        return hata.plane_weight_sum(self.query_bits, shape.group)

    def code_bytes(self, shape: Shape) -> int:
        """Size of the live codes and norms: what one scan reads."""
        heads = shape.batch * shape.num_kv_heads * shape.seq_len
        return heads * (4 * self.num_words + 2 * self.key_norms)

    def weight_bytes(self, shape: Shape) -> int:
        """Size of the key weights; the query weights are as large."""
        return shape.num_kv_heads * shape.head_dim * self.num_bits * shape.dtype.itemsize

    def __str__(self) -> str:
        norms = ", norms" if self.key_norms else ""
        return f"{self.name}: {self.num_bits} bits, query {self.query_bits}{norms}"


CONFIGS = (
    CodeConfig("A", num_bits=128, query_bits=1, key_norms=True),  # the paper's
    CodeConfig("B", num_bits=64, query_bits=4, key_norms=False),
    CodeConfig("C", num_bits=32, query_bits=4, key_norms=False),
)
WIDE = CodeConfig("A, wide", num_bits=256, query_bits=1, key_norms=True)


@dataclass(frozen=True)
class Case:
    """One decoding step to measure."""

    shape: Shape
    config: CodeConfig
    page_size: int = CONTIGUOUS

    @property
    def code_bytes(self) -> int:
        return self.config.code_bytes(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.shape.row_bytes

    @property
    def num_bytes(self) -> int:
        """What no step can avoid reading: every code and norm, and the selected rows."""
        return self.code_bytes + self.row_bytes

    def __str__(self) -> str:
        pages = f", pages of {self.page_size}" if self.page_size else ""
        return f"{self.shape}, {self.config}{pages}"
