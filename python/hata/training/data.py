"""What recipes learn from: queries and keys of several layers, all their KV heads side by side."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hata.selectors import Softmax


@dataclass(frozen=True)
class TrainingData:
    """Queries and keys of the KV heads of some layers, float32.

    ``heads = num_layers * num_kv_heads``, KV heads innermost.

    Attributes:
        layers: Which layers of the model these are.
        q: ``[num_sequences, heads, num_queries, group, head_dim]``.
        k: ``[num_sequences, heads, seq_len, head_dim]``.
        positions: ``[num_sequences, num_queries]``, int64, ascending: of the query tokens.
        softmax: Of all these heads.
        num_sink: First positions that are always selected.
        num_recent: Last positions that a query sees that are always selected.
    """

    layers: tuple[int, ...]
    q: Tensor
    k: Tensor
    positions: Tensor
    softmax: Softmax
    num_sink: int
    num_recent: int

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
