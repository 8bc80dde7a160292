"""The shapes and code settings that the benchmarks measure, and the bytes that each must move."""

from dataclasses import dataclass

import torch

import hata

NUM_SINK = 4
NUM_RECENT = 16
CONTIGUOUS = 0  # page_size of a case whose sequences are one page each


@dataclass(frozen=True)
class Shape:
    """One layer of a model while it decodes one token per sequence."""

    batch: int
    num_heads: int
    num_kv_heads: int
    seq_len: int
    head_dim: int = 128

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def top_k(self) -> int:
        """1.56 % of the sequence, the budget of HATA's efficiency runs."""
        return self.seq_len // 64

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Size of the K and V caches: what dense attention reads."""
        rows = self.batch * self.num_kv_heads * self.seq_len
        return 2 * rows * self.head_dim * dtype.itemsize

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Size of the selected K and V rows: what attention over the selection reads."""
        rows = self.batch * self.num_kv_heads * self.top_k
        return 2 * rows * self.head_dim * dtype.itemsize

    def __str__(self) -> str:
        """Returns batch, heads and length: "8 x 32/8 x 128K"."""
        return f"{self.batch} x {self.num_heads}/{self.num_kv_heads} x {self.seq_len >> 10}K"


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

    def num_planes(self, shape: Shape) -> int:
        return hata.num_planes(self.weight_sum(shape))

    def code_bytes(self, shape: Shape) -> int:
        """Size of the codes and norms: what one scan reads."""
        tokens = shape.batch * shape.num_kv_heads * shape.seq_len
        return tokens * (4 * self.num_words + 2 * self.key_norms)

    def weight_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """Size of the key weights; the query weights are as large."""
        return shape.num_kv_heads * shape.head_dim * self.num_bits * dtype.itemsize

    def __str__(self) -> str:
        norms = ", norms" if self.key_norms else ""
        return f"{self.name}: {self.num_bits} bits, query {self.query_bits}{norms}"


CONFIGS = (
    CodeConfig("A", num_bits=128, query_bits=1, key_norms=True),  # the paper's
    CodeConfig("B", num_bits=64, query_bits=4, key_norms=False),
    CodeConfig("C", num_bits=32, query_bits=4, key_norms=False),
)

CUDA_SHAPES = (
    Shape(1, 32, 8, 2 << 10),
    Shape(1, 32, 8, 32 << 10),
    Shape(1, 32, 8, 128 << 10),
    Shape(8, 32, 8, 32 << 10),
    Shape(8, 32, 8, 128 << 10),
    Shape(1, 32, 32, 32 << 10),
    Shape(8, 32, 32, 32 << 10),
    Shape(1, 32, 32, 256 << 10),
    Shape(8, 28, 4, 128 << 10),
)
CPU_SHAPES = (Shape(1, 32, 8, 2 << 10), Shape(1, 32, 8, 8 << 10), Shape(1, 32, 8, 32 << 10))


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    shapes: tuple[Shape, ...]
    configs: tuple[CodeConfig, ...]
    paged: tuple[Shape, ...]  # also measured with pages of 16 tokens, in the second configuration
    prompt: Shape  # whose sequence is appended in one call


def plan_for(device: torch.device, quick: bool) -> Plan:
    """Returns the shapes of the device; ``quick`` is for continuous integration."""
    if device.type == "cuda":
        if quick:
            shape = Shape(1, 32, 8, 8 << 10)
            return Plan((shape,), CONFIGS[:2], (), shape)
        paged = (CUDA_SHAPES[1], CUDA_SHAPES[4])
        return Plan(CUDA_SHAPES, CONFIGS, paged, CUDA_SHAPES[1])
    if quick:
        shape = Shape(1, 8, 2, 2 << 10)
        return Plan((shape,), CONFIGS[:2], (), shape)
    return Plan(CPU_SHAPES, CONFIGS, (CPU_SHAPES[-1],), CPU_SHAPES[-1])
