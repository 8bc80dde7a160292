"""Where training data comes from: captures on disk, or random numbers for timing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hata.training.captures import Captures
from hata.training.data import TrainingData


class Source(Protocol):
    """Queries and keys of a model's layers."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """num_sequences, num_queries, group, num_kv_heads, seq_len, head_dim of a layer."""

    def load(self, layers: Sequence[int], device: torch.device) -> TrainingData:
        """Reads these layers."""


@dataclass(frozen=True)
class CapturedSource:
    """Sequences of a capture.

    Attributes:
        captures: The capture.
        sequences: Which of its sequences.
        num_sink: First positions that are always selected.
        num_recent: Last positions that are always selected.
    """

    captures: Captures
    sequences: range
    num_sink: int
    num_recent: int

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.captures.info.num_layers

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """num_sequences, num_queries, group, num_kv_heads, seq_len, head_dim of a layer."""
        info = self.captures.info
        sizes = (info.num_queries, info.group, info.num_kv_heads, info.seq_len, info.head_dim)
        return (len(self.sequences), *sizes)

    def load(self, layers: Sequence[int], device: torch.device) -> TrainingData:
        """Reads these layers."""
        return TrainingData.load(
            self.captures,
            layers,
            self.sequences,
            num_sink=self.num_sink,
            num_recent=self.num_recent,
            device=device,
        )


@dataclass(frozen=True)
class SyntheticSource:
    """Random numbers of a model's shape: what training costs, not what it learns.

    Attributes:
        num_layers: Layers.
        num_heads: Query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_dim: Channels of a head.
        num_sequences: Sequences.
        seq_len: Tokens of each.
        num_queries: Query tokens of each, in its second half.
        num_sink: First positions that are always selected.
        num_recent: Last positions that are always selected.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_sequences: int
    seq_len: int
    num_queries: int
    num_sink: int
    num_recent: int

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """num_sequences, num_queries, group, num_kv_heads, seq_len, head_dim of a layer."""
        group = self.num_heads // self.num_kv_heads
        sizes = (self.num_queries, group, self.num_kv_heads, self.seq_len, self.head_dim)
        return (self.num_sequences, *sizes)

    def load(self, layers: Sequence[int], device: torch.device) -> TrainingData:
        """Draws these layers: the same numbers for the same layers and device."""
        num_sequences, num_queries, group, num_kv_heads, seq_len, head_dim = self.shape
        heads = len(layers) * num_kv_heads
        generator = torch.Generator(device).manual_seed(layers[0])
        first = seq_len // 2
        step = (seq_len - first) / num_queries
        positions = first + (torch.arange(num_queries, device=device) * step).long()

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        return TrainingData(
            tuple(layers),
            draw(num_sequences, heads, num_queries, group, head_dim),
            draw(num_sequences, heads, seq_len, head_dim),
            positions.expand(num_sequences, -1),
            head_dim**-0.5,
            self.num_sink,
            self.num_recent,
        )
