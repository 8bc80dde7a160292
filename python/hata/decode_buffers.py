"""What one sparse decoding step of a layer writes, allocated once per shape."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hata import ops


@dataclass(frozen=True)
class DecodeBuffers:
    """Workspace and outputs of `hata.ops.decode_step`.

    Attributes:
        workspace: Scratch memory, uint8; all layers share it.
        indices: ``[batch, q_len, num_kv_heads, top_k]``, int32.
        num_selected: ``[batch, q_len, num_kv_heads]``, int32.
        out: ``[batch, q_len, num_heads, head_dim]``, the cache's dtype.
        lse: ``[batch, q_len, num_heads]``, float32.
    """

    workspace: Tensor
    indices: Tensor
    num_selected: Tensor
    out: Tensor
    lse: Tensor


class DecodeBufferPool:
    """The buffers of every layer and (q_len, num_heads) that a cache has decoded with.

    Attributes:
        last: By layer, the buffers that its last step wrote.

    Args:
        batch: Sequences.
        num_kv_heads: KV heads.
        head_dim: Channels of a head.
        capacity: Positions that a sequence can have.
        top_k: Positions that each KV head attends to.
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
        top_k: int,
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
        """Returns the layer's buffers for this shape and notes them as its last ones."""
        key = (layer_idx, q_len, num_heads)
        buffers = self._buffers.get(key)
        if buffers is None:
            buffers = self._buffers[key] = self._allocate(q_len, num_heads)
        self.last[layer_idx] = buffers
        return buffers

    def _allocate(self, q_len: int, num_heads: int) -> DecodeBuffers:
        if (q_len, num_heads) not in self._workspaces:
            heads = (num_heads, self.num_kv_heads, self.head_dim)
            size = ops.workspace_size(self.batch, q_len, *heads, self.capacity, self.top_k)
            workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._workspaces[q_len, num_heads] = workspace
        pairs = (self.batch, q_len, self.num_kv_heads)
        rows = (self.batch, q_len, num_heads)
        return DecodeBuffers(
            workspace=self._workspaces[q_len, num_heads],
            indices=torch.empty((*pairs, self.top_k), dtype=torch.int32, device=self.device),
            num_selected=torch.empty(pairs, dtype=torch.int32, device=self.device),
            out=torch.empty((*rows, self.head_dim), dtype=self.dtype, device=self.device),
            lse=torch.empty(rows, dtype=torch.float32, device=self.device),
        )
