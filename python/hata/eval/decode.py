"""Sparse decoding of known tokens, all in one forward pass."""

import copy
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hata.checks import check
from hata.eval.completion import complete
from hata.eval.prose import WHERE
from hata.eval.setting import DENSE, Setting
from hata.integrations.model_shape import full_attention_layers
from hata.integrations.transformers_attention import torch_attention_forward
from hata.integrations.transformers_cache import CACHE_ARGUMENT
from hata.selectors import Queries, Softmax

_ATTENTION = "hata_eval"
_TOLD = "hata_selection"  # the attention function's argument that says what a pass is for
_PIECE = 1024  # tokens of a prompt that a model with windows reads at once
_SCORES_AT_ONCE = 2**24  # of all heads: about 0.3 GB with what selectors and `rank` make of them


@dataclass
class _Reading:
    """What the attention function is told while a prompt is read: whose queries to keep.

    Attributes:
        observed: The model's layers whose queries are kept.
        queries: What is kept, ``[length, num_kv_heads, group, head_dim]`` for each piece read.
        modules: The attention of every layer.
    """

    observed: Collection[int]
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    modules: dict[int, Any] = field(default_factory=dict)

    def keep(self, module: Any, query: Tensor, num_kv_heads: int) -> None:
        """Keeps a layer's queries."""
        self.modules[module.layer_idx] = module
        if module.layer_idx in self.observed:
            self.queries.setdefault(module.layer_idx, []).append(_by_token(query[0], num_kv_heads))


@dataclass
class _Selection:
    """What the attention function is told, and what it leaves for the layers that share it.

    Attributes:
        setting: How tokens are decoded.
        layers: The number among the selector's layers of each of the model's that it has.
        prompt: What was kept of the prompt.
        foresight: Foresees the queries of the next layer, for selectors that go by those.
        mask: What the last layer that selected has selected.
        rest: ``[q_len, num_kv_heads, group]``: the share of its attention that what it left out
            gets, where the setting completes it.
    """

    setting: Setting
    layers: dict[int, int]
    prompt: _Reading
    foresight: "_Foresight | None" = None
    mask: Tensor | None = None
    rest: Tensor | None = None

    @cached_property
    def selecting(self) -> dict[int, int]:
        """The layer whose selection each of the model's sparse layers attends to."""
        if self.setting.selector is None:
            return {}
        return self.setting.selecting(list(self.layers))

    def select(self, layer: int, query: Tensor, key: Tensor, softmax: Softmax) -> None:
        """Selects for a layer; see `_selected`."""
        num_kv_heads = key.shape[1]
        asked = own = _by_token(query[0], num_kv_heads)
        if self.foresight is not None and layer in self.foresight.queries:
            asked = _by_token(self.foresight.queries[layer][0], num_kv_heads)
        known = None
        if layer in self.prompt.queries:
            every = torch.cat([*self.prompt.queries[layer], own])
            known = Queries(every, torch.arange(len(every), device=every.device))
        self._select(layer, asked, own, key[0], softmax, known)

    def _select(
        self,
        layer: int,
        asked: Tensor,
        own: Tensor,
        key: Tensor,
        softmax: Softmax,
        known: Queries | None,
    ) -> None:
        """Sets the positions that the last tokens attend to.

        The mask is ``[1, num_heads, q_len, seq_len]``: bool, or in the keys' dtype what is added to
        the logits where the selected positions have weights.

        Args:
            layer: The model's layer.
            asked: ``[q_len, num_kv_heads, group, head_dim]``: the queries that the selector scores
                with, of the last tokens.
            own: The same shape: the queries that attend.
            key: ``[num_kv_heads, seq_len, head_dim]``, theirs included.
            softmax: The layer's.
            known: The queries of all tokens, where they are kept.
        """
        setting, completion = self.setting, self.setting.completion
        selector = setting.selector
        assert selector is not None  # what `_attend` has made sure of
        (num_kv_heads, seq_len, _), (q_len, _, group, _) = key.shape, own.shape
        positions = torch.arange(seq_len - q_len, seq_len, device=key.device)
        keys, number = key.transpose(0, 1), self.layers[layer]
        score = selector.index(number, keys, softmax, known)
        budgets = [setting.budget(layer)]
        always = {"num_sink": setting.num_sink, "num_recent": setting.num_recent}
        masks, rests = [], []
        chunk = max(1, _SCORES_AT_ONCE // (num_kv_heads * group * seq_len))
        for first in range(0, q_len, chunk):
            tokens = slice(first, first + chunk)
            seen = positions[tokens]
            scores = score(asked[tokens].float(), seen)
            (selection,) = selector.select(number, scores, seen, budgets, **always)
            indices = selection.indices.where(selection.indices >= 0, seq_len)  # a column for -1
            shape = (*indices.shape[:2], seq_len + 1)
            if selection.weights is None:
                mask = torch.zeros(shape, dtype=torch.bool, device=key.device)
                mask.scatter_(2, indices, True)
            else:
                mask = torch.full(shape, -torch.inf, dtype=key.dtype, device=key.device)
                mask.scatter_(2, indices, selection.weights.log().to(key.dtype))
            masks.append(mask[..., :seq_len])
            if completion is not None:
                of_tokens = (scores, masks[-1], seen, softmax)
                rests.append(completion.rest(own[tokens], keys, *of_tokens))
        by_kv_head = torch.cat(masks).transpose(0, 1)
        self.mask = by_kv_head.repeat_interleave(group, 0)[None]
        self.rest = torch.cat(rests) if rests else None


class SparseDecoder:
    """Decodes given tokens after a dense prompt as `hata.integrations.transformers.enable` does.

    Token i of a call attends to what its setting selects of the prompt and of tokens 0 to i; its
    keys and values come from the sparse layers below. That is what decoding step by step gives, in
    one forward pass with a mask of the selected positions.

    Args:
        model: A model that `enable` supports; it is left on this class's attention function. Layers
            with a window stay as they are.
        observe: Whether to keep the prompt's queries, for selectors that go by them: as many
            numbers as the cache has keys, for each query head.
    """

    def __init__(self, model: Any, observe: bool = False) -> None:
        self._model = model
        self._layers = {layer: i for i, layer in enumerate(full_attention_layers(model))}
        self._observed = self._layers if observe else ()
        self._prompt: Any = None
        self._reading = _Reading(())
        model.set_attn_implementation(_ATTENTION)

    @torch.inference_mode()
    def read(self, prompt_ids: list[int]) -> None:
        """Reads a prompt, densely, in place of the one before.

        Where layers have a window it is read in pieces: attention to a window then costs what
        window and piece hold, not what the prompt does.
        """
        self._prompt = DynamicCache(config=self._model.config)
        self._reading = _Reading(self._observed)
        kinds = {type(layer) for layer in self._prompt.layers}
        windows = DynamicSlidingWindowLayer in kinds
        windows &= kinds <= {DynamicLayer, DynamicSlidingWindowLayer}  # no layer with a state
        tokens = torch.tensor(prompt_ids)
        for piece in tokens.split(_PIECE if windows else len(tokens)):
            self._forward(piece, self._prompt, self._reading, logits_to_keep=1)

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
        selection = _Selection(setting, self._layers, self._reading)
        tokens, cache = torch.tensor(token_ids), copy.deepcopy(self._prompt)
        with ExitStack() as stack:
            if setting.selector is not None and setting.selector.foresees:
                selection.foresight = stack.enter_context(_Foresight(self._reading.modules))
            logits = self._forward(tokens, cache, selection).float()
        reached = selection.mask is not None or not selection.selecting
        rule, name = "hand its arguments on to its attention function", type(self._model).__name__
        check(reached, where, "model", rule, name)
        return logits

    def _forward(
        self, tokens: Tensor, cache: Any, told: _Reading | _Selection, **settings: Any
    ) -> Tensor:
        settings |= {CACHE_ARGUMENT: cache, _TOLD: told}
        tokens = tokens[None].to(self._model.device)
        logits: Tensor = self._model(tokens, use_cache=True, **settings).logits
        return logits[0]


class _Foresight:
    """Makes a layer's queries of the attention input of the layer before, while it is open.

    Before a layer attends, its attention runs once more, on that input, as far as its queries.
    Source: InfiniGen, arXiv 2406.19707.

    Args:
        modules: The attention of every layer of the model.
    """

    def __init__(self, modules: dict[int, Any]) -> None:
        self.queries: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}
        self._modules = modules
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Foresight":
        """Begins to listen to the model's attention."""
        for module in self._modules.values():
            hook = module.register_forward_pre_hook(self._before, with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(self, *failure: object) -> None:
        """Lets the model alone again."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if kwargs.get(_TOLD) is self:  # the run that this has begun
            return
        alone = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
        hidden_states = alone.pop("hidden_states", None)
        if hidden_states is None:  # handed over by position
            hidden_states, *args = args
        self._inputs[module.layer_idx] = hidden_states
        before = self._inputs.get(module.layer_idx - 1)
        if before is not None:
            module(before, *args, **{**alone, _TOLD: self})


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    hata_selection: _Reading | _Selection | _Foresight | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q, k, v are ``[1, heads, length, head_dim]``."""
    no_bias = kwargs.get("position_bias") is None
    check(no_bias, WHERE, "model", "attend without position_bias", "one with it")
    if isinstance(hata_selection, _Foresight):
        hata_selection.queries[module.layer_idx] = query
        _, num_heads, q_len, _ = query.shape
        return value.new_zeros(1, q_len, num_heads, value.shape[3]), None  # of no interest
    if isinstance(hata_selection, _Reading):
        hata_selection.keep(module, query, key.shape[1])
    rest = None
    if isinstance(hata_selection, _Selection):
        selecting = hata_selection.selecting.get(module.layer_idx)
        if selecting is not None:
            if selecting == module.layer_idx:
                logits = (scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
                softmax = Softmax.of_attention(query, key, *logits)
                hata_selection.select(module.layer_idx, query, key, softmax)
            attention_mask, rest = hata_selection.mask, hata_selection.rest
    out, _ = torch_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return out if rest is None else complete(out, value, rest), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _by_token(query: Tensor, num_kv_heads: int) -> Tensor:
    """``[num_heads, length, head_dim]`` as ``[length, num_kv_heads, group, head_dim]``."""
    return query.unflatten(0, (num_kv_heads, -1)).permute(2, 0, 1, 3)
