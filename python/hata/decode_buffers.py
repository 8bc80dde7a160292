"""What one decoding step of a sparse layer writes, allocated once per shape."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hata import ops
from hata.checks import check


@dataclass(frozen=True)
class DecodeBuffers:
    """Workspace and outputs of `hata.ops.decode_step`.

    Attributes:
        workspace: Scratch memory, uint8; all layers share it.
        indices: ``[batch, q_len, num_kv_heads, min(top_k, capacity)]``, int32; the layer's top_k.
        num_selected: ``[batch, q_len, num_kv_heads]``, int32.
        out: ``[batch, q_len, num_heads, head_dim]``, the cache's dtype.
        lse: ``[batch, q_len, num_heads]``, float32.
        last_score: ``[batch, q_len, num_kv_heads]``, int32, or float16 with norms; None where cuts
            are not recorded.
        num_ties: The same shape, int32; likewise.
    """

    workspace: Tensor
    indices: Tensor
    num_selected: Tensor
    out: Tensor
    lse: Tensor
    last_score: Tensor | None = None
    num_ties: Tensor | None = None

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

    def cut(self, dense: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the recorded last_score and num_ties, with no ties where a sequence was dense.

        Args:
            dense: Batch indices of the sequences that were attended densely.
        """
        assert self.last_score is not None
        assert self.num_ties is not None
        if not dense:
            return self.last_score, self.num_ties
        last_score, num_ties = self.last_score.clone(), self.num_ties.clone()
        floating = last_score.is_floating_point()
        last_score[dense] = -torch.inf if floating else torch.iinfo(last_score.dtype).min
        num_ties[dense] = 0
        return last_score, num_ties


class DecodeBufferPool:
    """The buffers of every layer and (q_len, num_heads) that a cache has decoded with.

    Attributes:
        last: By layer, the buffers that its last step wrote.
        last_step: By layer, the number of that step.

    Args:
        batch: Sequences.
        num_kv_heads: KV heads.
        head_dim: Channels of a head.
        capacity: Positions that a sequence can have.
        top_k: The most positions that each KV head of a layer attends to, ``[num_layers]``.
        selecting_layers: The layer whose selection each layer attends to, ``[num_layers]``.
        dtype: The dtype of ``out``.
        score_dtype: The dtype of ``last_score``; None where cuts are not recorded.
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
        selecting_layers: Sequence[int],
        dtype: torch.dtype,
        score_dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.batch, self.num_kv_heads, self.head_dim = batch, num_kv_heads, head_dim
        self.capacity, self.top_k, self.selecting_layers = capacity, top_k, selecting_layers
        self.dtype, self.score_dtype, self.device = dtype, score_dtype, device
        self.last: dict[int, DecodeBuffers] = {}
        self.last_step: dict[int, int] = {}
        self._workspaces: dict[tuple[int, int], Tensor] = {}
        self._buffers: dict[tuple[int, int, int], DecodeBuffers] = {}

    def get(self, layer_idx: int, q_len: int, num_heads: int) -> DecodeBuffers:
        """Returns the layer's buffers for this shape, with the selection that it attends to."""
        key = (layer_idx, q_len, num_heads)
        buffers = self._buffers.get(key)
        if buffers is None:
            selecting = self.selecting_layers[layer_idx]
            if selecting == layer_idx:
                buffers = self._allocate(self.top_k[layer_idx], q_len, num_heads)
            else:
                buffers = self.get(selecting, q_len, num_heads)
                out, lse = torch.empty_like(buffers.out), torch.empty_like(buffers.lse)
                buffers = replace(buffers, out=out, lse=lse)
            self._buffers[key] = buffers
        return buffers

    def note(self, layer_idx: int, buffers: DecodeBuffers, step: int) -> None:
        """Notes what a layer's step has written.

        Args:
            layer_idx: The layer.
            buffers: Where the results are.
            step: The number of the step.
        """
        self.last[layer_idx], self.last_step[layer_idx] = buffers, step

    def shared(self, layer_idx: int, step: int) -> DecodeBuffers:
        """Returns what another layer has written whose selection a layer attends to.

        Args:
            layer_idx: The layer.
            step: The number of the step.

        Raises:
            ValueError: The other layer has not selected in this step.
        """
        selecting = self.selecting_layers[layer_idx]
        made = self.last_step.get(selecting) == step
        rule = f"follow layer {selecting}, whose selection it shares, in the same sparse step"
        check(made, "decode_attention", f"layer {layer_idx}", rule, "no selection of this step")
        return self.last[selecting]

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

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        score_dtype = self.score_dtype
        return DecodeBuffers(
            workspace=self._workspaces[q_len, num_heads],
            indices=empty(*pairs, width),
            num_selected=empty(*pairs),
            out=empty(*rows, self.head_dim, dtype=self.dtype),
            lse=empty(*rows, dtype=torch.float32),
            last_score=None if score_dtype is None else empty(*pairs, dtype=score_dtype),
            num_ties=None if score_dtype is None else empty(*pairs),
        )
