"""An attention function for transformers that attends with SDPA and records queries and keys."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hata.checks import check

_NAME = "hata_capture"
_WHERE = "capture"

# layer_idx, q [num_queries, num_heads, head_dim], k and v [seq_len, num_kv_heads, head_dim], scale
OnLayer = Callable[[int, Tensor, Tensor, Tensor, float], None]


class Recorder:
    """Runs a model over one sequence and hands over each layer as soon as it is complete.

    Attributes:
        model: Any model that takes attention functions.
        chunk: Tokens of one forward pass; fewer than the sequence's need less memory.

    Raises:
        ValueError: The model takes no attention functions.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        takes = isinstance(model, PreTrainedModel) and getattr(
            model, "_supports_attention_backend", False
        )
        rule = "take attention functions (transformers' AttentionInterface)"
        check(takes, _WHERE, "model", rule, type(model).__name__)
        self.model, self.chunk = model, chunk
        self._positions = torch.empty(0, dtype=torch.int64)
        self._start, self._seq_len = 0, 0
        self._queries: dict[int, list[Tensor]] = {}
        self._on_layer: OnLayer | None = None
        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, sdpa_mask)

    @torch.inference_mode()
    def run(self, token_ids: list[int], positions: Tensor, on_layer: OnLayer) -> None:
        """Records one sequence.

        Args:
            token_ids: The sequence.
            positions: ``[num_queries]``, int64, ascending: whose queries are recorded.
            on_layer: Takes each layer, in the order in which the model finishes them.
        """
        model, seq_len = self.model, len(token_ids)
        before = model.config._attn_implementation
        model.set_attn_implementation(_NAME)
        self._positions, self._on_layer, self._queries = positions, on_layer, {}
        self._seq_len = seq_len
        cache: Any = None
        tokens = torch.tensor([token_ids], device=model.device)
        try:
            for start in range(0, seq_len, self.chunk):
                self._start = start
                piece = tokens[:, start : start + self.chunk]
                kept = {"past_key_values": cache} if cache is not None else {}
                # The base model: a head would make logits for every token.
                out = model.base_model(piece, use_cache=self.chunk < seq_len, **kept)
                cache = getattr(out, "past_key_values", None)
        finally:
            model.set_attn_implementation(before)
            self._on_layer, self._queries = None, {}

    def _attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The attention function: q, k, v are ``[1, heads, length, head_dim]``."""
        for name in ("softcap", "s_aux", "position_bias"):
            check(kwargs.get(name) is None, _WHERE, name, "be None in attention", "a value")
        layer_idx: Any = module.layer_idx
        end = self._start + query.shape[2]
        rule = f"hold all {end} positions (sliding windows need a larger --memory-limit-gb)"
        check(key.shape[2] == end, _WHERE, f"the keys of layer {layer_idx}", rule, key.shape[2])
        inside = (self._positions >= self._start) & (self._positions < end)
        rows = (self._positions[inside] - self._start).to(query.device)
        self._queries.setdefault(layer_idx, []).append(query[0][:, rows].transpose(0, 1).cpu())
        if end == self._seq_len:
            q = torch.cat(self._queries.pop(layer_idx))
            k, v = (x[0].transpose(0, 1) for x in (key, value))
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            assert self._on_layer is not None  # run has set it
            self._on_layer(layer_idx, q, k, v, scale)
        # Groups are spelled out: CUDA's kernel for float32 knows none, and what torch takes in its
        # place forms the whole matrix of scores.
        group = query.shape[1] // key.shape[1]
        out = scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=attention_mask,
            is_causal=attention_mask is None and query.shape[2] > 1,
            scale=scaling,
        )
        return out.transpose(1, 2).contiguous(), None
