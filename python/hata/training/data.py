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
        rotary: `CaptureInfo.rotary`, ``[head_dim / 2]``, float64; None where it is not known.
    """

    layers: tuple[int, ...]
    q: Tensor
    k: Tensor
    positions: Tensor
    softmax: Softmax
    num_sink: int
    num_recent: int
    rotary: Tensor | None = None

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


def turned(x: Tensor, angles: Tensor | None, by: int) -> Tensor:
    """Turns queries or keys as the rotary embedding does; their products with each other stay.

    Args:
        x: ``[..., head_dim]``.
        angles: For one position, ``[head_dim / 2]``: channels i and ``i + head_dim / 2`` are turned
            by the i-th. None returns ``x``.
        by: Positions.
    """
    if angles is None:
        return x
    cos, sin = (by * angles).cos().to(x), (by * angles).sin().to(x)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
