"""transformers models with hata attention: ``enable(model)``, then ``model.generate(...)``.

`enable` registers with transformers' public interfaces: an attention function and a mask function,
both called "hata", and a `Cache`. The model's layers that attend to the whole context get a
`HataLayer` in that cache, the others transformers' own. A `HataLayer` stores nothing when it is
handed new keys; it hands them on as `NewKeys`, which only hata's attention function takes. That
function serves keys of every other kind with transformers' "sdpa", and so the model's other layers
and passes without a cache.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from hata.attention import decode_attention, prefill
from hata.cache import HataCache
from hata.checks import check, check_int, check_type
from hata.config import HataConfig
from hata.integrations.model_shape import (
    ModelShape,
    full_attention_layers,
    model_shape,
    own_cache_layers,
)
from hata.pretrained import find_pretrained
from hata.sequences import check_page_size
from hata.weights import HashWeights, load_weights

_HERE = "integrations.transformers"
_NAME = "hata"  # of the attention and mask functions

# What forward passes and `generate` call a cache, and their outputs too: renamed in 5.24.
CACHE_ARGUMENT = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"

# After a prompt that `generate` has announced, longer passes are prompt again: no draft is as long.
MAX_DRAFT_LEN = 32

# The HataCache's layer_idx, q [batch, q_len, num_heads, head_dim], it, indices, num_selected
DecodeObserver = Callable[[int, Tensor, HataCache, Tensor, Tensor], None]


@dataclass(frozen=True)
class _Settings:
    """What `enable` has settled, and every cache of the model is made from.

    Attributes:
        model_config: The model's config.
        config: The budget, of the model's layers.
        weights: The hash weights as they were given.
        layers: The model's layers that are hata's, ``[num_layers]`` of a `HataCache`.
        layer_config: The budget, of these layers.
        layer_weights: Their weights.
        max_seq_len: Positions that a sequence can have.
        page_size: Positions of a page; None for a contiguous cache.
        observer: Called after each sparse decoding step, or None.
    """

    model_config: Any
    config: HataConfig
    weights: HashWeights
    layers: tuple[int, ...]
    layer_config: HataConfig
    layer_weights: HashWeights
    max_seq_len: int
    page_size: int | None
    observer: DecodeObserver | None

    def __deepcopy__(self, memo: object) -> "_Settings":
        """Returns itself: nothing in it changes."""
        return self


@dataclass(frozen=True)
class _Padding:
    """Where a prompt has padding.

    Attributes:
        new_seqlens: Real tokens, ``[batch]``.
        order: ``[batch, q_len]``: the tokens' columns, padding first, as a `HataCache` takes them.
        unpadded: Last columns without any padding.
    """

    new_seqlens: list[int]
    order: Tensor
    unpadded: int

    def first(self, x: Tensor) -> Tensor:
        """Moves padding to the left; x is ``[batch, q_len, heads, head_dim]``."""
        return x.take_along_dim(self.order[:, :, None, None], 1)

    def back(self, x: Tensor) -> Tensor:
        """Undoes `first`."""
        return x.take_along_dim(self.order.argsort(1)[:, :, None, None], 1)


@dataclass
class _CausalMask:
    """The mask of a layer that attends to the whole context: causal, and perhaps padded.

    Attributes:
        arguments: What transformers hands to a mask function; ``attention_mask`` among them is None
            or ``[batch, kv_length]``, bool, with False for padding.
    """

    arguments: dict[str, Any]

    @cached_property
    def for_sdpa(self) -> Tensor | None:
        """The mask as "sdpa" takes it; None where it is causal and nothing else."""
        return sdpa_mask(**self.arguments)

    def padding(self, q_len: int) -> "_Padding | None":
        """Reads which of the last ``q_len`` tokens are padding; None if none is.

        Waits for the device: once a prompt, where `generate` has found padding in it.
        """
        mask: Tensor | None = self.arguments["attention_mask"]
        if mask is None:
            return None
        kv_len, rule = self.arguments["kv_length"], "cover the tokens of the cache and the new ones"
        check(mask.shape[1] == kv_len, _HERE, "attention_mask", rule, list(mask.shape))
        new = mask[:, kv_len - q_len :]
        column = torch.arange(1, q_len + 1, device=mask.device)
        last = (column * ~new).amax()  # the last column with padding, counted from 1
        *real, last_column = torch.cat([new.sum(1), last[None]]).tolist()
        if last_column == 0:
            return None
        return _Padding(real, new.int().argsort(dim=1, stable=True), q_len - last_column)

    def __getattr__(self, name: str) -> NoReturn:
        """Refuses what a model that changes its mask asks for."""
        raise AttributeError(f"hata.{_HERE}: the model must leave its mask as it is, got .{name}")


@dataclass
class NewKeys:
    """New keys on their way from the cache to hata's attention function, which alone takes them.

    Attributes:
        layer: The layer that will store them.
        states: ``[batch, num_kv_heads, q_len, head_dim]``.
        taken: Whether they have been attended to; once is all that a layer may.
    """

    layer: "HataLayer"
    states: Tensor
    taken: bool = False

    def __getattr__(self, name: str) -> NoReturn:
        """Refuses any other attention function, and models that change cached keys."""
        raise ValueError(
            f"hata.{_HERE}: keys of a hata cache must go to the attention function "
            f'"{_NAME}" (enable(model)), got another one, or a model that changes them: .{name}'
        )


@dataclass
class _LayerGroup:
    """What the hata layers of one transformers cache share.

    Attributes:
        settings: What `enable` has settled.
        max_seq_len: Positions that a sequence of this cache can have, padding included.
        cache: The cache; None until the first keys tell batch, dtype and device.
        prompt_len: Tokens of the prompt, padding included, as `generate` has announced it, or None.
        croppable: Last tokens that are real in every sequence.
        decoding: Whether the step decodes; else its tokens are prompt.
        padding: Of the step's tokens; None if all are real.
    """

    settings: _Settings
    max_seq_len: int
    cache: HataCache | None = None
    prompt_len: int | None = None
    croppable: int = 0
    decoding: bool = False
    padding: _Padding | None = None

    def cache_for(self, k: Tensor, seen: int) -> HataCache:
        """Returns the cache, made anew where it is empty and k is of another batch or kind."""
        wanted = (k.shape[0], k.dtype, k.device)
        cache = self.cache
        if cache is None or (seen == 0 and wanted != (cache.batch, cache.dtype, cache.device)):
            cache = self.cache = HataCache(
                self.settings.layer_weights,
                self.settings.layer_config,
                batch=k.shape[0],
                max_seq_len=self.max_seq_len,
                page_size=self.settings.page_size,
                dtype=k.dtype,
                device=k.device,
            )
        return cache

    def open_step(self, seen: int, q_len: int, mask: _CausalMask | None) -> None:
        """Decides how all layers treat the tokens of a forward pass.

        Args:
            seen: Tokens that the cache holds, padding included.
            q_len: New tokens.
            mask: The model's mask.
        """
        if self.prompt_len is None:
            self.decoding = seen > 0 and q_len == 1
        else:
            self.decoding = seen >= self.prompt_len and q_len <= MAX_DRAFT_LEN
        self.padding = None if self.decoding or mask is None else mask.padding(q_len)

    def close_step(self, q_len: int) -> None:
        """Notes what the first layer has stored."""
        padding = self.padding
        self.croppable = self.croppable + q_len if padding is None else padding.unpadded


class HataLayer(CacheLayerMixin):
    """One layer: `update` hands the new keys on, `attend` stores them and attends.

    Args:
        group: What the layers share.
        layer_idx: The layer of the `HataCache`.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, group: _LayerGroup, layer_idx: int) -> None:
        super().__init__()
        self.group, self.layer_idx, self.seen = group, layer_idx, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache of all layers."""
        self.group.cache_for(key_states, self.seen)

    def update(  # type: ignore[override]  # the keys are for hata's attention function
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[NewKeys, Tensor]:
        """Hands the new keys and values on to the attention function."""
        return NewKeys(self, key_states), value_states

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: _CausalMask | None,
        softmax_scale: float | None,
    ) -> Tensor:
        """Stores new tokens and attends: sparsely where they are decoded, densely in a prompt.

        Args:
            q: ``[batch, q_len, num_heads, head_dim]``.
            k: ``[batch, q_len, num_kv_heads, head_dim]``.
            v: The same.
            mask: The model's mask.
            softmax_scale: Factor of the logits, or None.

        Returns:
            ``[batch, q_len, num_heads, head_dim]``.
        """
        group, layer_idx, q_len = self.group, self.layer_idx, q.shape[1]
        cache = group.cache_for(k, self.seen)
        if layer_idx == 0:
            group.open_step(self.seen, q_len, mask)
        padding = group.padding
        if group.decoding:
            out = decode_attention(q, k, v, cache, layer_idx, softmax_scale=softmax_scale)
        elif padding is None:
            out = prefill(q, k, v, cache, layer_idx, softmax_scale=softmax_scale)
        else:
            q, k, v = (padding.first(x) for x in (q, k, v))
            new = padding.new_seqlens
            out = padding.back(
                prefill(q, k, v, cache, layer_idx, softmax_scale=softmax_scale, new_seqlens=new)
            )
        self.seen += q_len
        if layer_idx == 0:
            group.close_step(q_len)
        observer = group.settings.observer
        if observer is not None and group.decoding and layer_idx >= cache.config.num_dense_layers:
            observer(layer_idx, q, cache, *cache.last_selection(layer_idx))
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys that a mask would cover, and its offset."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the tokens of every sequence, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """Returns the positions that a sequence can have."""
        return self.group.max_seq_len


class HataTransformersCache(Cache):
    """A transformers cache that keeps a model's keys and values in a `hata.HataCache`.

    The layers that do not attend to the whole context have transformers' own cache layers in it.
    Its memory is allocated at the first forward pass, which tells batch, dtype and device. Like any
    transformers cache it continues where it stands: `reset` it before an unrelated prompt. After a
    forward pass that failed halfway, `reset` it too.

    Attributes:
        config: The settings.
        weights: The hash weights; ``weights.metadata["origin"]`` says if they are random.
        hata_layers: The model's index of each layer of ``hata_cache``.
        max_seq_len: Positions that a sequence can have.
    """

    layers: list[Any]  # HataLayer, or transformers' own

    def __init__(self, settings: _Settings, max_seq_len: int) -> None:
        self._group = _LayerGroup(settings, max_seq_len)
        self.config, self.weights = settings.config, settings.weights
        self.hata_layers, self.max_seq_len = settings.layers, max_seq_len
        super().__init__(layers=self._new_layers())

    def _new_layers(self) -> list[Any]:
        layers = own_cache_layers(self._group.settings.model_config)
        for layer_idx, model_layer in enumerate(self.hata_layers):
            layers[model_layer] = HataLayer(self._group, layer_idx)
        return layers

    @property
    def hata_cache(self) -> HataCache | None:
        """The cache itself; None before the first forward pass."""
        return self._group.cache

    def announce_prompt(self, prompt_len: int | None) -> None:
        """Says how many tokens of every sequence, padding included, are prompt.

        Those beyond are decoded. None, as at first: a pass of one token after others is decoded.
        """
        self._group.prompt_len = prompt_len

    def reset(self) -> None:
        """Empties every sequence."""
        if self._group.cache is not None:
            self._group.cache.reset()
        self._group.prompt_len, self._group.croppable = None, 0
        self.layers = self._new_layers()

    def crop(self, tokens_to_remove: int | Tensor) -> None:  # 5.17 counts drafts on the device
        """Removes tokens from the end of every sequence.

        Args:
            tokens_to_remove: The negative number of them; 0 removes none.

        Raises:
            TypeError: It is no int.
            ValueError: It is positive, or there are not as many tokens since the last padding.
        """
        group = self._group
        if isinstance(tokens_to_remove, Tensor):
            tokens_to_remove = int(tokens_to_remove)
        check_int(f"{_HERE}.crop", "tokens_to_remove", tokens_to_remove, -group.croppable, 0)
        if group.cache is not None and tokens_to_remove < 0:
            group.cache.truncate([n + tokens_to_remove for n in group.cache.seq_lens])
            group.croppable += tokens_to_remove
            if group.prompt_len is not None:
                group.prompt_len = min(group.prompt_len, self.get_seq_length() + tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, HataLayer):
                layer.seen += tokens_to_remove
            else:
                layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Lets sequence b continue as the old sequence ``beam_idx[b]``, for beam search.

        Args:
            beam_idx: ``[batch]`` ints.

        Raises:
            ValueError: An entry is out of range, or there are not ``batch`` of them.
        """
        if self._group.cache is not None:
            self._group.cache.reorder(beam_idx)
        for layer in self.layers:
            if not isinstance(layer, HataLayer):
                layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported: the batch is fixed by the first forward pass."""
        raise ValueError(f"hata.{_HERE}: the batch must stay as it is, got {repeats} repeats")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not supported: the batch is fixed by the first forward pass."""
        raise ValueError(f"hata.{_HERE}: the batch must stay as it is, got the selection {indices}")


@dataclass
class _Enabled:
    """What `disable` needs, and what `generate` makes caches from.

    Attributes:
        settings: What `enable` has settled.
        attention: The model's attention implementation before.
        hook: Of the model's forward pass.
    """

    settings: _Settings
    attention: str
    hook: Any


def enable(
    model: PreTrainedModel,
    config: HataConfig | None = None,
    *,
    top_k: int | None = None,
    weights: HashWeights | str | PathLike[str] | None = None,
    max_seq_len: int | None = None,
    page_size: int | None = None,
    observer: DecodeObserver | None = None,
) -> HataTransformersCache:
    """Switches a model to hata attention and makes a cache for it.

    The prompt is attended to densely and exactly, as with "sdpa"; each token after it is decoded
    sparsely, except in the model's first ``config.num_dense_layers`` layers, and densely too while
    the sequence is shorter than ``config.min_sparse_len``, which by default is where a sparse step
    becomes the faster one::

        cache = enable(model, top_k=256)
        model.generate(**inputs, max_new_tokens=100)  # with a cache of its own
        model.generate(**inputs, max_new_tokens=100, cache=cache)  # with one to go on from

    Only layers that attend to the whole context become hata's; those with a window, with chunks or
    with a recurrent state stay as they are. A forward pass without a cache is dense, with
    gradients. `disable` makes the model what it was. docs/transformers.md says more: which models
    there are, padding, chunks and drafts. transformers before 5.24 calls the argument
    ``past_key_values``.

    Source: HATA, arXiv 2506.02572; transformers' ``AttentionInterface`` and ``Cache``.

    Args:
        model: A text-only decoder (docs/models.md). Two forward passes of one token show that its
            layers can be hata's.
        config: The budget; None is `HataConfig`'s defaults. It counts all layers of the model.
        top_k: Positions that each KV head attends to, in place of ``config.top_k``.
        weights: Hash weights for this model's layers, or for those that become hata's, or a file
            of `hata.save_weights`. None takes the package's own for a model of this name and
            shape; where there are none it draws random orthogonal ones (64 bits, seed 0), which
            select less well than trained ones, and warns.
        max_seq_len: Tokens of prompt and answer together that the cache has room for, at most the
            model's ``max_position_embeddings``; None is that number. The memory for all of them is
            taken at the first forward pass; the caches of `generate` are as short as they can be.
        page_size: Positions of a page, a power of two; None for a contiguous cache.
        observer: Called after each sparse layer's decoding step as ``observer(layer_idx, q, cache,
            indices, num_selected)``: q ``[batch, q_len, num_heads, head_dim]``, cache the
            `hata.HataCache`, layer_idx its layer, the rest as `HataCache.last_selection` gives it.

    Returns:
        The cache to pass to ``generate``; empty, and good for one ``generate`` at a time.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument breaks its rule, the model is not supported, or the weights are of
            another shape; the model is then unchanged.
    """
    where = f"{_HERE}.enable"
    check_type(isinstance(model, PreTrainedModel), where, "model", "be a PreTrainedModel", model)
    config = HataConfig() if config is None else config
    check_type(isinstance(config, HataConfig), where, "config", "be a HataConfig", config)
    if top_k is not None:
        config = replace(config, top_k=top_k)
    shape, layers = _supported(where, model)
    positions = model.config.max_position_embeddings
    max_seq_len = positions if max_seq_len is None else max_seq_len
    check_int(where, "max_seq_len", max_seq_len, 1, positions)
    if page_size is not None:
        check_page_size(where, page_size)
    callable_observer = observer is None or callable(observer)
    check_type(callable_observer, where, "observer", "be callable", observer)
    budgets = config.layer_top_k(shape["num_layers"])  # raises if it names another number of layers
    chosen = _choose_weights(where, model, shape, weights)
    settings = _Settings(
        model_config=model.config,
        config=config,
        weights=chosen,
        layers=layers,
        layer_config=replace(
            config,
            top_k=tuple(budgets[layer] for layer in layers),
            num_dense_layers=sum(layer < config.num_dense_layers for layer in layers),
        ),
        layer_weights=chosen.for_model(where, **shape, layers=layers),
        max_seq_len=max_seq_len,
        page_size=page_size,
        observer=observer,
    )
    attention = model.config._attn_implementation
    _try(where, model, replace(settings, page_size=None, observer=None))
    before: _Enabled | None = vars(model).get("_hata")
    if before is not None:
        attention = before.attention
        before.hook.remove()
    hook = model.register_forward_pre_hook(_check_cache, with_kwargs=True)
    vars(model)["_hata"] = _Enabled(settings, attention, hook)
    vars(model)["_prepare_cache_for_generation"] = MethodType(_prepare_cache, model)
    return HataTransformersCache(settings, max_seq_len)


def disable(model: PreTrainedModel) -> None:
    """Makes the model what it was before `enable`; one that is not enabled stays as it is.

    Args:
        model: The model. Its hata caches are of no more use.
    """
    enabled = vars(model).pop("_hata", None)
    if enabled is not None:
        enabled.hook.remove()
        del vars(model)["_prepare_cache_for_generation"]
        model.set_attn_implementation(enabled.attention)


@contextmanager
def enabled(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Iterator[HataTransformersCache]:
    """Enables hata attention inside a ``with`` block; takes `enable`'s arguments, gives its cache.

    Raises:
        TypeError: As `enable`.
        ValueError: As `enable`.
    """
    cache = enable(model, *args, **kwargs)
    try:
        yield cache
    finally:
        disable(model)


def _prepare_cache(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Stands in for the model's ``_prepare_cache_for_generation``: makes the cache, or takes it."""
    settings = model._hata.settings
    given = model_kwargs.get(CACHE_ARGUMENT) is not None
    active = model.config._attn_implementation == _NAME
    if not given and active and generation_config.use_cache is not False:
        kind, where = generation_config.cache_implementation, f"{_HERE}.generate"
        check(kind in (None, "dynamic"), where, "cache_implementation", "be None", kind)
        max_seq_len = settings.max_seq_len
        if not generation_config.is_assistant:  # whose cache serves many short calls
            max_seq_len = min(max_seq_len, max_cache_length + 1)
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            max_seq_len += MAX_DRAFT_LEN  # the last draft may be longer than what is left to write
        new = HataTransformersCache(settings, max_seq_len)
        if generation_config.is_assistant:
            new.activate_past_recording()
        model_kwargs[CACHE_ARGUMENT] = new
    else:
        prepare = type(model)._prepare_cache_for_generation
        prepare(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
    cache = model_kwargs.get(CACHE_ARGUMENT)
    if isinstance(cache, HataTransformersCache):
        mask = model_kwargs.get("attention_mask")  # None where it would be all ones, since 5.24
        without_mask = getattr(generation_config, "_mask_length", None)
        cache.announce_prompt(without_mask if mask is None else mask.shape[1])


def _check_cache(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Runs before the model's forward pass."""
    if model.config._attn_implementation != _NAME:
        return
    for name in ("cache", "past_key_values"):
        cache = kwargs.get(name)
        fits = cache is None or isinstance(cache, HataTransformersCache)
        check(fits, _HERE, name, "be None or what enable() returned", type(cache).__name__)


def _choose_weights(
    function: str,
    model: PreTrainedModel,
    shape: ModelShape,
    weights: HashWeights | str | PathLike[str] | None,
) -> HashWeights:
    if weights is None:
        found = find_pretrained(Path(model.name_or_path or "").name)
        if found is not None and found.shape[:3] == tuple(shape.values()):
            return found
        warnings.warn(
            f"hata.{function}: weights is None and the package has none for this model, so keys "
            "are hashed with random orthogonal weights (64 bits, seed 0); weights trained for the "
            "model select better",
            stacklevel=3,
        )
        return HashWeights.random(**shape)
    if isinstance(weights, str | PathLike):
        weights = load_weights(weights)
    rule = "be HashWeights or the name of a file"
    check_type(isinstance(weights, HashWeights), function, "weights", rule, weights)
    return weights


def _supported(function: str, model: Any) -> tuple[ModelShape, tuple[int, ...]]:
    """Returns the sizes of a model, and its layers that become hata's; or raises."""
    settings = model.config
    name = type(model).__name__
    decoder = settings.get_text_config(decoder=True) is settings and not settings.is_encoder_decoder
    check(decoder, function, "model", "be a text-only decoder", name)
    check(model.can_generate(), function, "model", "be able to generate text", name)
    backend = model._can_set_attn_implementation()
    check(backend, function, "model", "take attention functions (AttentionInterface)", name)
    latent, rule = getattr(settings, "kv_lora_rank", None), "have keys and values, not latent ones"
    check(latent is None, function, "model", rule, f"{name} with kv_lora_rank={latent}")
    cached = model._supports_default_dynamic_cache()
    check(cached, function, "model", "take transformers' caches", name)
    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings")
    missing = [size for size in sizes if not isinstance(getattr(settings, size, None), int)]
    check(not missing, function, "model", "name its sizes in its config", f"no {missing}")
    layers = full_attention_layers(model)
    rule = "have a layer that attends to the whole context, with a plain cache"
    kinds = getattr(settings, "layer_types", None)
    window = getattr(settings, "sliding_window", None)
    got = f"sliding_window={window}" if kinds is None else f"layer_types {sorted(set(kinds))}"
    check(layers != (), function, "model", rule, got)
    return model_shape(model), layers


@torch.no_grad()
def _try(function: str, model: PreTrainedModel, settings: _Settings) -> None:
    """Runs one token of prompt and one of answer, and leaves the model on hata's attention.

    What a model's attention does is written nowhere but in its code: extra inputs, heads of another
    size, keys that change after they were cached. So it is tried.
    """
    before = model.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    cache = HataTransformersCache(settings, min(2, settings.max_seq_len))
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        model.eval()
        model.set_attn_implementation(_NAME)
        for _ in range(cache.max_seq_len):
            model(token, use_cache=True, **{CACHE_ARGUMENT: cache})
        attended = [layer.seen for layer in cache.layers if isinstance(layer, HataLayer)]
        rule = "call the attention function in every full-attention layer"
        calls = f"{sum(seen > 0 for seen in attended)} of {len(attended)}"
        called = all(seen == cache.max_seq_len for seen in attended)
        check(called, function, "model", rule, calls)
    except torch.OutOfMemoryError:
        model.set_attn_implementation(before)
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        model.set_attn_implementation(before)
        name = type(model).__name__
        raise ValueError(
            f"hata.{function}: model must attend as hata does, got {name}, in which one token "
            f"fails: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | NewKeys,
    value: Tensor,
    attention_mask: _CausalMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q, k, v are ``[batch, heads, length, head_dim]``."""
    for name in ("softcap", "s_aux", "position_bias"):
        check(kwargs.get(name) is None, _HERE, name, "be None", "a value")
    if not isinstance(key, NewKeys):
        mask = attention_mask
        if isinstance(mask, _CausalMask):
            mask = mask.for_sdpa
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rule, got = "be causal over the whole context", "another mask"
    check(not isinstance(attention_mask, Tensor), _HERE, "attention_mask", rule, got)
    assert not isinstance(attention_mask, Tensor)  # what check has made sure of
    check(dropout == 0.0, _HERE, "dropout", "be 0 (call model.eval())", dropout)
    check(not key.taken, _HERE, "the keys of a layer", "be attended to once", "another time")
    key.taken = True
    q, k, v = (x.transpose(1, 2) for x in (query, key.states, value))
    return key.layer.attend(q, k, v, attention_mask, scaling), None


def _mask(**arguments: Any) -> _CausalMask | Tensor | None:
    """The mask function: leaves the plain causal mask to the attention function."""
    if arguments.get("mask_function", causal_mask_function) is causal_mask_function:
        return _CausalMask(arguments)
    return sdpa_mask(**arguments)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _mask)
