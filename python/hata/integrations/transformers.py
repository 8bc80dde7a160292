"""transformers models with hata attention: ``model.generate(..., cache=cache)``.

`enable` registers with transformers' public interfaces: an attention function and a mask function,
both called "hata", and a `Cache`. The attention function is not handed the cache; so the cache
marks the keys that it passes on, and the function finds its layer by that mark.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from hata.attention import decode_attention, prefill
from hata.cache import HataCache
from hata.checks import check, check_int, check_type
from hata.config import HataConfig
from hata.integrations.model_shape import ModelShape, model_shape
from hata.pretrained import find_pretrained
from hata.sequences import check_page_size
from hata.weights import HashWeights, load_weights

_HERE = "integrations.transformers"
_MARK = "_hata_layer"

# What forward passes and `generate` call a cache, and their outputs too: renamed in 5.24.
CACHE_ARGUMENT = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"

# layer_idx, q [batch, 1, num_heads, head_dim], the cache, indices, num_selected
DecodeObserver = Callable[[int, Tensor, HataCache, Tensor, Tensor], None]


class LayerGroup:
    """What the layers of one transformers cache share.

    Attributes:
        cache: The cache; None until the first keys tell batch, dtype and device.

    Args:
        config: The settings.
        weights: The model's hash weights.
        max_seq_len: Positions that a sequence can have.
        page_size: Positions of a page; None for a contiguous cache.
        observer: Called after each sparse decoding step, or None.
    """

    def __init__(
        self,
        config: HataConfig,
        weights: HashWeights,
        max_seq_len: int,
        page_size: int | None,
        observer: DecodeObserver | None,
    ) -> None:
        self.config, self.weights = config, weights
        self.max_seq_len, self.page_size = max_seq_len, page_size
        self.observer = observer
        self.cache: HataCache | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of every sequence."""
        return 0 if self.cache is None else self.cache.seq_lens[0]

    def cache_for(self, k: Tensor) -> HataCache:
        """Returns the cache, made anew where it is empty and k is of another batch or kind."""
        wanted = (k.shape[0], k.dtype, k.device)
        cache = self.cache
        if cache is None or (
            self.seq_len == 0 and wanted != (cache.batch, cache.dtype, cache.device)
        ):
            cache = self.cache = HataCache(
                self.weights,
                self.config,
                batch=k.shape[0],
                max_seq_len=self.max_seq_len,
                page_size=self.page_size,
                dtype=k.dtype,
                device=k.device,
            )
        return cache


class HataLayer(CacheLayerMixin):
    """One layer: `update` marks the new keys, `attend` stores them and attends.

    Args:
        group: What the layers share.
        layer_idx: The layer.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, group: LayerGroup, layer_idx: int) -> None:
        super().__init__()
        self.group, self.layer_idx = group, layer_idx

    @staticmethod
    def of(key: Tensor) -> "HataLayer | None":
        """Returns the layer that passed on these keys, if one did."""
        return getattr(key, _MARK, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache of all layers."""
        self.group.cache_for(key_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Passes the new keys and values on to the attention function, marked as this layer's."""
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> Tensor:
        """Stores new tokens and attends: sparsely for one token, densely for a prompt.

        Args:
            q: ``[batch, q_len, num_heads, head_dim]``.
            k: ``[batch, q_len, num_kv_heads, head_dim]``.
            v: The same.
            softmax_scale: Factor of the logits, or None.

        Returns:
            ``[batch, q_len, num_heads, head_dim]``.
        """
        group = self.group
        cache = group.cache_for(k)
        if q.shape[1] > 1:
            return prefill(q, k, v, cache, self.layer_idx, softmax_scale=softmax_scale)
        out = decode_attention(q, k, v, cache, self.layer_idx, softmax_scale=softmax_scale)
        if group.observer is not None and self.layer_idx >= group.config.num_dense_layers:
            selection = cache.last_selection(self.layer_idx)
            group.observer(self.layer_idx, q, cache, *selection)
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys that a mask would cover, and its offset."""
        return self.group.seq_len + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the tokens of every sequence."""
        return self.group.seq_len

    def get_max_length(self) -> int:
        """Returns the positions that a sequence can have."""
        return self.group.max_seq_len


class HataTransformersCache(Cache):
    """A transformers cache that keeps a model's keys and values in a `hata.HataCache`.

    Its memory is allocated at the first forward pass, which tells batch, dtype and device. Like any
    transformers cache it continues where it stands: `reset` it before an unrelated prompt. After a
    forward pass that failed halfway, `reset` it too.

    Attributes:
        config: The settings.
        weights: The hash weights; ``weights.metadata["origin"]`` says if they are random.
        max_seq_len: Positions that a sequence can have.
    """

    def __init__(self, group: LayerGroup) -> None:
        super().__init__(layers=[HataLayer(group, i) for i in range(group.weights.shape[0])])
        self._group = group
        self.config, self.weights = group.config, group.weights
        self.max_seq_len = group.max_seq_len

    @property
    def hata_cache(self) -> HataCache | None:
        """The cache itself; None before the first forward pass."""
        return self._group.cache

    def reset(self) -> None:
        """Empties every sequence."""
        if self._group.cache is not None:
            self._group.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end of every sequence.

        Args:
            tokens_to_remove: The negative number of them; 0 removes none.

        Raises:
            TypeError: It is no int.
            ValueError: It is positive, or there are not as many tokens.
        """
        seq_len = self._group.seq_len
        check_int(f"{_HERE}.crop", "tokens_to_remove", tokens_to_remove, -seq_len, 0)
        if self._group.cache is not None:
            self._group.cache.truncate(seq_len + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Lets sequence b continue as the old sequence ``beam_idx[b]``, for beam search.

        Args:
            beam_idx: ``[batch]`` ints.

        Raises:
            ValueError: An entry is out of range, or there are not ``batch`` of them.
        """
        if self._group.cache is not None:
            self._group.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported: the batch is fixed by the first forward pass."""
        raise ValueError(f"hata.{_HERE}: the batch must stay as it is, got {repeats} repeats")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not supported: the batch is fixed by the first forward pass."""
        raise ValueError(f"hata.{_HERE}: the batch must stay as it is, got the selection {indices}")


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

    The prompt is attended to densely and exactly, as with "sdpa"; each token after it (every
    forward pass of one token) is decoded sparsely, except in the first
    ``config.num_dense_layers`` layers, and densely too while the sequence is shorter than
    ``config.min_sparse_len``, which by default is where a sparse step becomes the faster one::

        cache = enable(model, top_k=256)
        model.generate(**inputs, max_new_tokens=100, cache=cache)

    The model then runs with such a cache only; ``model.set_attn_implementation("sdpa")`` switches
    it back. A batch must hold sequences of equal length, without padding. Inference only.
    transformers before 5.24 calls the argument ``past_key_values``.

    Source: HATA, arXiv 2506.02572; transformers' ``AttentionInterface`` and ``Cache``.

    Args:
        model: A text-only decoder whose layers all attend to the whole context: the Llama family,
            Qwen2, Qwen3, Mistral without a sliding window, and others built like them.
        config: The budget; None is `HataConfig`'s defaults.
        top_k: Positions that each KV head attends to, in place of ``config.top_k``.
        weights: Hash weights for this model, or a file of `hata.save_weights`. None takes the
            package's own for a model of this name and shape; where there are none it draws random
            orthogonal ones (64 bits, seed 0), which select less well than trained ones, and warns.
        max_seq_len: Tokens of prompt and answer together that the cache has room for, at most the
            model's ``max_position_embeddings``; None is that number. The memory for all of them is
            taken at the first forward pass, unless ``page_size`` and few pages are asked for.
        page_size: Positions of a page, a power of two; None for a contiguous cache.
        observer: Called after each sparse layer's decoding step as ``observer(layer_idx, q, cache,
            indices, num_selected)``: q ``[batch, 1, num_heads, head_dim]``, cache the
            `hata.HataCache`, the rest as `HataCache.last_selection` gives it.

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
    shape = _supported_shape(where, model)
    positions = model.config.max_position_embeddings
    max_seq_len = positions if max_seq_len is None else max_seq_len
    check_int(where, "max_seq_len", max_seq_len, 1, positions)
    if page_size is not None:
        check_page_size(where, page_size)
    callable_observer = observer is None or callable(observer)
    check_type(callable_observer, where, "observer", "be callable", observer)
    config.layer_top_k(shape["num_layers"])  # raises where it names another number of layers
    chosen = _choose_weights(where, model, shape, weights)
    cache = HataTransformersCache(LayerGroup(config, chosen, max_seq_len, page_size, observer))
    model.set_attn_implementation("hata")
    return cache


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
    weights.check_model(function, **shape)
    return weights


def _supported_shape(function: str, model: PreTrainedModel) -> ModelShape:
    """Returns the sizes of a model that hata can run, or raises."""
    settings = model.config
    name = type(model).__name__
    decoder = settings.get_text_config(decoder=True) is settings and not settings.is_encoder_decoder
    check(decoder, function, "model", "be a text-only decoder", name)
    check(model.can_generate(), function, "model", "be able to generate text", name)
    backend = getattr(model, "_supports_attention_backend", False)
    check(backend, function, "model", "take attention functions (AttentionInterface)", name)
    sliding = getattr(settings, "sliding_window", None)
    chunk = getattr(settings, "attention_chunk_size", None)
    layer_types = getattr(settings, "layer_types", None)
    if layer_types is None:
        full = sliding is None and chunk is None
        got = f"sliding_window={sliding}, attention_chunk_size={chunk}"
    else:
        full = all(layer_type == "full_attention" for layer_type in layer_types)
        got = f"layer_types {sorted(set(layer_types))}"
    check(full, function, "model", "attend to the whole context in every layer", got)
    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings")
    missing = [size for size in sizes if not isinstance(getattr(settings, size, None), int)]
    check(not missing, function, "model", "name its sizes in its config", f"no {missing}")
    return model_shape(model)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q, k, v are ``[batch, heads, q_len, head_dim]``, k and v new."""
    layer = HataLayer.of(key)
    rule = "be the HataTransformersCache that enable() returned"
    check(layer is not None, _HERE, CACHE_ARGUMENT, rule, "another cache, or none")
    assert layer is not None  # what check has made sure of, for the type checker
    rule = "be None (equal lengths, no padding)"
    shape = None if attention_mask is None else list(attention_mask.shape)
    check(attention_mask is None, _HERE, "attention_mask", rule, f"one of shape {shape}")
    check(dropout == 0.0, _HERE, "dropout", "be 0 (call model.eval())", dropout)
    for name in ("softcap", "s_aux", "position_bias"):
        check(kwargs.get(name) is None, _HERE, name, "be None", "a value")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return layer.attend(q, k, v, scaling), None


def _no_mask(
    *args: Any,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """The mask function: hata's attention is causal by itself and takes no other mask."""
    causal = mask_function is causal_mask_function
    got = getattr(mask_function, "__qualname__", mask_function)
    check(causal, _HERE, "the model's mask", "be causal over the whole context", got)
    if attention_mask is not None:
        padding = int(attention_mask.numel() - attention_mask.count_nonzero())
        rule = "be all ones (equal lengths, no padding)"
        check(padding == 0, _HERE, "attention_mask", rule, f"{padding} zeros")


AttentionInterface.register("hata", _attend)
AttentionMaskInterface.register("hata", _no_mask)
