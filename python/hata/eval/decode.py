"""Sparse decoding of known tokens, all in one forward pass."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hata.checks import check
from hata.eval.prose import WHERE
from hata.integrations.model_shape import full_attention_layers
from hata.integrations.transformers_attention import torch_attention_forward
from hata.integrations.transformers_cache import CACHE_ARGUMENT
from hata.selectors import Selector, Softmax, rank

_ATTENTION = "hata_eval"
_PIECE = 1024  # tokens of a prompt that a model with windows reads at once
_SCORES_AT_ONCE = 2**24  # of all heads: about 0.3 GB with what selectors and `rank` make of them


@dataclass(frozen=True)
class Setting:
    """How tokens are decoded.

    Attributes:
        selector: Chooses what each token attends to; None attends to everything.
        top_k: Positions that each KV head attends to, sinks and recent ones included.
        num_dense_layers: The model's leading layers that attend to everything.
        num_sink: First positions that are always among them.
        num_recent: Last positions that are always among them.
        share_layers: Sparse layers in a row that attend to one selection, that of the first of
            them. Source: Kascade, arXiv 2512.16391, which chooses by calibration the layers that
            select, and which heads go together; here each ``share_layers``-th selects, for the same
            heads.
    """

    selector: Selector | None = None
    top_k: int = 0
    num_dense_layers: int = 0
    num_sink: int = 0
    num_recent: int = 0
    share_layers: int = 1


DENSE = Setting()


@dataclass
class _Selection:
    """What the attention function is told, and what it leaves for the layers that share it.

    Attributes:
        setting: How tokens are decoded.
        layers: The number among the selector's layers of each of the model's that it has.
        mask: What the last layer that selected has selected.
    """

    setting: Setting
    layers: dict[int, int]
    mask: Tensor | None = None

    @property
    def sparse_layers(self) -> list[int]:
        """The model's layers that attend to a selection."""
        if self.setting.selector is None:
            return []
        return [layer for layer in self.layers if layer >= self.setting.num_dense_layers]


class SparseDecoder:
    """Decodes given tokens after a dense prompt as `hata.integrations.transformers.enable` does.

    Token i of a call attends to what its setting selects of the prompt and of tokens 0 to i; its
    keys and values come from the sparse layers below. That is what decoding step by step gives, in
    one forward pass with a mask of the selected positions.

    Args:
        model: A model that `enable` supports; it is left on this class's attention function. Layers
            with a window stay as they are.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = {layer: i for i, layer in enumerate(full_attention_layers(model))}
        self._prompt: Any = None
        model.set_attn_implementation(_ATTENTION)

    @torch.inference_mode()
    def read(self, prompt_ids: list[int]) -> None:
        """Reads a prompt, densely, in place of the one before.

        Where layers have a window it is read in pieces: attention to a window then costs what
        window and piece hold, not what the prompt does.
        """
        self._prompt = DynamicCache(config=self._model.config)
        kinds = {type(layer) for layer in self._prompt.layers}
        windows = DynamicSlidingWindowLayer in kinds
        windows &= kinds <= {DynamicLayer, DynamicSlidingWindowLayer}  # no layer with a state
        tokens = torch.tensor(prompt_ids)
        for piece in tokens.split(_PIECE if windows else len(tokens)):
            self._forward(piece, self._prompt, None, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self, token_ids: list[int], setting: Setting = DENSE) -> Tensor:
        """Decodes tokens after the prompt; each call begins where the prompt ends.

        Args:
            token_ids: At least 2 tokens.
            setting: How.

        Returns:
            ``[len(token_ids), vocabulary]``, float32: what the model says follows each token.

        Raises:
            ValueError: There are fewer tokens, or the model keeps the setting from its attention.
        """
        where = "eval.SparseDecoder.decode"
        check(len(token_ids) >= 2, where, "token_ids", "be at least 2", len(token_ids))
        selection = _Selection(setting, self._layers)
        tokens, cache = torch.tensor(token_ids), copy.deepcopy(self._prompt)
        logits = self._forward(tokens, cache, selection).float()
        reached = selection.mask is not None or not selection.sparse_layers
        rule, name = "hand its arguments on to its attention function", type(self._model).__name__
        check(reached, where, "model", rule, name)
        return logits

    def _forward(
        self, tokens: Tensor, cache: Any, selection: _Selection | None, **settings: Any
    ) -> Tensor:
        settings |= {CACHE_ARGUMENT: cache, "hata_selection": selection}
        tokens = tokens[None].to(self._model.device)
        logits: Tensor = self._model(tokens, use_cache=True, **settings).logits
        return logits[0]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    hata_selection: _Selection | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q, k, v are ``[1, heads, length, head_dim]``."""
    no_bias = kwargs.get("position_bias") is None
    check(no_bias, WHERE, "model", "attend without position_bias", "one with it")
    sparse = [] if hata_selection is None else hata_selection.sparse_layers
    if hata_selection is not None and module.layer_idx in sparse:
        setting, number = hata_selection.setting, hata_selection.layers[module.layer_idx]
        if sparse.index(module.layer_idx) % setting.share_layers == 0:
            logits = (scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
            softmax = Softmax.of_attention(query, key, *logits)
            hata_selection.mask = _selected(setting, number, query[0], key[0], softmax)
        attention_mask = hata_selection.mask
    return torch_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _selected(
    setting: Setting, layer_idx: int, query: Tensor, key: Tensor, softmax: Softmax
) -> Tensor:
    """The positions that the last tokens attend to.

    Args:
        setting: How they are selected.
        layer_idx: The layer's number among the selector's.
        query: ``[num_heads, q_len, head_dim]``, of the last tokens.
        key: ``[num_kv_heads, seq_len, head_dim]``, theirs included.
        softmax: The layer's.

    Returns:
        ``[1, num_heads, q_len, seq_len]``, bool.
    """
    assert setting.selector is not None  # what `_attend` has made sure of
    (num_heads, q_len, _), (num_kv_heads, seq_len, _) = query.shape, key.shape
    positions = torch.arange(seq_len - q_len, seq_len, device=key.device)
    queries = query.unflatten(0, (num_kv_heads, -1)).permute(2, 0, 1, 3).float()
    score = setting.selector.index(layer_idx, key.transpose(0, 1), softmax)
    masks = []
    chunk = max(1, _SCORES_AT_ONCE // (num_heads * seq_len))
    for q, seen in zip(queries.split(chunk), positions.split(chunk), strict=True):
        order = rank(
            score(q, seen),
            seen,
            setting.top_k,
            num_sink=setting.num_sink,
            num_recent=setting.num_recent,
            page_size=setting.selector.page_size,
        )
        mask = torch.zeros(*order.shape[:2], seq_len + 1, dtype=torch.bool, device=key.device)
        mask.scatter_(2, order.where(order >= 0, seq_len), True)  # the last column stands for -1
        masks.append(mask[..., :seq_len])
    by_kv_head = torch.cat(masks).transpose(0, 1)
    return by_kv_head.repeat_interleave(num_heads // num_kv_heads, 0)[None]
