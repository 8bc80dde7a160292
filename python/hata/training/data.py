"""What recipes learn from: queries and keys of several layers, all their KV heads side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hata.training.captures import Captures


@dataclass(frozen=True)
class TrainingData:
    """Queries and keys of the KV heads of some layers, float32.

    ``heads = num_layers * num_kv_heads``, KV heads innermost.

    Attributes:
        layers: Which layers of the model these are.
        q: ``[num_sequences, heads, num_queries, group, head_dim]``.
        k: ``[num_sequences, heads, seq_len, head_dim]``.
        positions: ``[num_sequences, num_queries]``, int64, ascending: of the query tokens.
        softmax_scale: Factor of the logits.
        num_sink: First positions that are always selected.
        num_recent: Last positions that a query sees that are always selected.
    """

    layers: tuple[int, ...]
    q: Tensor
    k: Tensor
    positions: Tensor
    softmax_scale: float
    num_sink: int
    num_recent: int

    @classmethod
    def load(
        cls,
        captures: Captures,
        layers: Sequence[int],
        sequences: range,
        *,
        num_sink: int,
        num_recent: int,
        device: torch.device,
    ) -> "TrainingData":
        """Reads these layers and sequences of a capture."""
        info = captures.info
        width = info.num_kv_heads
        shape = (len(sequences), len(layers) * width)
        q = torch.empty(*shape, info.num_queries, info.group, info.head_dim, device=device)
        k = torch.empty(*shape, info.seq_len, info.head_dim, device=device)
        positions = torch.empty(len(sequences), info.num_queries, dtype=torch.int64, device=device)
        for row, sequence_idx in enumerate(sequences):
            for i, layer_idx in enumerate(layers):
                found = captures.shard(sequence_idx, layer_idx, device)
                heads = slice(i * width, (i + 1) * width)
                groups = found["q"].unflatten(1, (width, info.group))
                q[row, heads].copy_(groups.permute(1, 0, 2, 3))
                k[row, heads].copy_(found["k"].transpose(0, 1))
                positions[row].copy_(found["positions"])
        return cls(tuple(layers), q, k, positions, info.softmax_scale, num_sink, num_recent)

    @property
    def heads(self) -> int:
        """KV heads of all layers."""
        return self.k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.heads // len(self.layers)

    @property
    def num_sequences(self) -> int:
        """Sequences."""
        return self.k.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens of each sequence."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.k.shape[3]

    def visible(self, sequence_idx: int, rows: Tensor | slice) -> Tensor:
        """Which keys each query token sees: ``[num_rows, seq_len]``, bool."""
        positions = self.positions[sequence_idx, rows]
        return torch.arange(self.seq_len, device=self.k.device) <= positions[:, None]
