"""Where training data comes from: captures on disk, or random numbers for timing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from hata.checks import check
from hata.training.captures import Captures
from hata.training.data import TrainingData
from hata.training.options import CaptureOptions

_WHERE = "train"


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

    @classmethod
    def open(
        cls, folder: Path, heldout: Path | None, *, num_sink: int, num_recent: int
    ) -> tuple["CapturedSource", "CapturedSource"]:
        """Opens captures to train on and to evaluate on.

        Args:
            folder: Captures to train on.
            heldout: Captures to evaluate on; None takes the last sequence of the others.
            num_sink: First positions that are always selected.
            num_recent: Last positions that are always selected.

        Raises:
            ValueError: A folder holds no complete capture, or the two are of different models.
        """
        found = Captures.open(folder)
        count = found.info.num_sequences
        if heldout is None:
            rule = "be given where the captures hold one sequence"
            check(count > 1, _WHERE, "--heldout", rule, "nothing")
            other, train_on, test_on = found, range(count - 1), range(count - 1, count)
        else:
            other = Captures.open(heldout)
            train_on, test_on = range(count), range(other.info.num_sequences)
        for size in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            wanted, got = getattr(found.info, size), getattr(other.info, size)
            check(wanted == got, _WHERE, f"{size} of --heldout", f"be {wanted}", got)
        always = {"num_sink": num_sink, "num_recent": num_recent}
        return cls(found, train_on, **always), cls(other, test_on, **always)

    @property
    def texts(self) -> str:
        """Where the sequences come from."""
        return " | ".join(self.captures.info.texts[i] for i in self.sequences)

    def load(self, layers: Sequence[int], device: torch.device) -> TrainingData:
        """Reads these layers."""
        num_sequences, num_queries, group, num_kv_heads, seq_len, head_dim = self.shape
        heads = len(layers) * num_kv_heads
        q = torch.empty(num_sequences, heads, num_queries, group, head_dim, device=device)
        k = torch.empty(num_sequences, heads, seq_len, head_dim, device=device)
        positions = torch.empty(num_sequences, num_queries, dtype=torch.int64, device=device)
        for row, sequence_idx in enumerate(self.sequences):
            for i, layer_idx in enumerate(layers):
                found = self.captures.shard(sequence_idx, layer_idx, device)
                of_layer = slice(i * num_kv_heads, (i + 1) * num_kv_heads)
                groups = found["q"].unflatten(1, (num_kv_heads, group))
                q[row, of_layer].copy_(groups.permute(1, 0, 2, 3))
                k[row, of_layer].copy_(found["k"].transpose(0, 1))
                positions[row].copy_(found["positions"])
        scale = self.captures.info.softmax_scale
        return TrainingData(tuple(layers), q, k, positions, scale, self.num_sink, self.num_recent)


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

    @classmethod
    def of_model(
        cls, text: str, sizes: CaptureOptions, *, num_sink: int, num_recent: int
    ) -> "SyntheticSource":
        """Makes a source of a model's shape.

        Args:
            text: "layers x heads x KV heads x head_dim", without spaces.
            sizes: How many sequences, tokens and queries.
            num_sink: First positions that are always selected.
            num_recent: Last positions that are always selected.

        Raises:
            ValueError: The text is not as above.
        """
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
        shape = [int(size) for size in found.groups()] if found else [0] * 4
        num_layers, num_heads, num_kv_heads, head_dim = shape
        whole = min(shape) > 0 and num_heads % num_kv_heads == 0
        rule = "be layers x heads x KV heads x head_dim, such as 32x32x8x128"
        check(whole, _WHERE, "--synthetic", rule, text)
        return cls(
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            sizes.num_sequences,
            sizes.seq_len,
            sizes.num_queries,
            num_sink,
            num_recent,
        )

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
