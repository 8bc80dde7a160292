"""What one decoding step of a sparse layer writes, allocated once per shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hata import ops


@dataclass(frozen=True)
class DecodeBuffers:
    """Workspace and outputs of `hata.ops.decode_step`.

    Attributes:
        workspace: Scratch memory, uint8; all layers share it.
        indices: ``[batch, q_len, num_kv_heads, min(top_k, capacity)]``, int32; the layer's top_k.
        num_selected: ``[batch, q_len, num_kv_heads]``, int32.
        out: ``[batch, q_len, num_heads, head_dim]``, the cache's dtype.
        lse: ``[batch, q_len, num_heads]``, float32.
    """

    workspace: Tensor
    indices: Tensor
    num_selected: Tensor
    out: Tensor
    lse: Tensor

    def selection(self, dense_lens: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Returns indices and num_selected, with every visible position where it was dense.

        Args:
            dense_lens: Length of each sequence that was attended densely, by batch index.
        """
        indices, num_selected = self.indices, self.num_selected
        if not dense_lens:
            return indices, num_selected
        batch, q_len, num_kv_heads, top_k = indices.shape
        width = max(top_k, *dense_lens.values())
        wide = indices.new_full((batch, q_len, num_kv_heads, width), -1)
        wide[..., :top_k] = indices
        num_selected = num_selected.clone()
        t = torch.arange(width, dtype=torch.int32, device=indices.device)
        token = torch.arange(1 - q_len, 1, dtype=torch.int32, device=indices.device)[:, None]
        for b, seq_len in dense_lens.items():
            visible = (token + seq_len).clamp(min=0)  # [q_len, 1]
            wide[b] = torch.where(t < visible, t, -1)[:, None]
            num_selected[b] = visible
        return wide, num_selected


class DecodeBufferPool:
    """The buffers of every layer and (q_len, num_heads) that a cache has decoded with.

    Attributes:
        last: By layer, the buffers that its last step wrote.

    Args:
        batch: Sequences.
        num_kv_heads: KV heads.
        head_dim: Channels of a head.
        capacity: Positions that a sequence can have.
        top_k: The most positions that each KV head of a layer attends to, ``[num_layers]``.
        dtype: The dtype of ``out``.
        device: Where they lie.
    """

    def __init__(
        self,
        *,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        top_k: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.batch, self.num_kv_heads, self.head_dim = batch, num_kv_heads, head_dim
        self.capacity, self.top_k = capacity, top_k
        self.dtype, self.device = dtype, device
        self.last: dict[int, DecodeBuffers] = {}
        self._workspaces: dict[tuple[int, int], Tensor] = {}
        self._buffers: dict[tuple[int, int, int], DecodeBuffers] = {}

    def get(self, layer_idx: int, q_len: int, num_heads: int) -> DecodeBuffers:
        """Returns the layer's buffers for this shape."""
        key = (layer_idx, q_len, num_heads)
        buffers = self._buffers.get(key)
        if buffers is None:
            buffers = self._buffers[key] = self._allocate(self.top_k[layer_idx], q_len, num_heads)
        return buffers

    def _allocate(self, top_k: int, q_len: int, num_heads: int) -> DecodeBuffers:
        if (q_len, num_heads) not in self._workspaces:
            heads = (num_heads, self.num_kv_heads, self.head_dim)
            size = max(
                ops.workspace_size(self.batch, q_len, *heads, self.capacity, budget)
                for budget in set(self.top_k)
            )
            workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._workspaces[q_len, num_heads] = workspace
        pairs = (self.batch, q_len, self.num_kv_heads)
        rows, width = (self.batch, q_len, num_heads), min(top_k, self.capacity)
        return DecodeBuffers(
            workspace=self._workspaces[q_len, num_heads],
            indices=torch.empty((*pairs, width), dtype=torch.int32, device=self.device),
            num_selected=torch.empty(pairs, dtype=torch.int32, device=self.device),
            out=torch.empty((*rows, self.head_dim), dtype=self.dtype, device=self.device),
            lse=torch.empty(rows, dtype=torch.float32, device=self.device),
        )
