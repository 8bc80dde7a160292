"""transformers models with hata attention: ``model.generate(..., past_key_values=cache)``.

`enable` registers with transformers' public interfaces: an attention function and a mask function,
both called "hata", and a `Cache`. The attention function is not handed the cache; so the cache
marks the keys that it passes on, and the function finds its layer by that mark.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from hata.checks import check, check_int, check_type
from hata.config import HataConfig
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers_layer import DecodeObserver, HataLayer, LayerGroup
from hata.pages import check_page_size
from hata.weights import HashWeights

_HERE = "integrations.transformers"


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
    def hata_cache(self) -> Any:
        """The `hata.HataCache`; None before the first forward pass."""
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
    config: HataConfig,
    weights: HashWeights | None = None,
    *,
    max_seq_len: int,
    page_size: int | None = None,
    observer: DecodeObserver | None = None,
) -> HataTransformersCache:
    """Switches a model to hata attention and makes a cache for it.

    The prompt is attended to densely and exactly, as with "sdpa"; each token after it (every
    forward pass of one token) is decoded sparsely, except in the first
    ``config.num_dense_layers`` layers, and densely too while the sequence is shorter than
    ``config.min_sparse_len``, which by default is where a sparse step becomes the faster one::

        cache = enable(model, HataConfig(top_k=256), max_seq_len=4096)
        model.generate(**inputs, max_new_tokens=100, past_key_values=cache)

    The model then runs with such a cache only; ``model.set_attn_implementation("sdpa")`` switches
    it back. A batch must hold sequences of equal length, without padding. Inference only.

    Source: HATA, arXiv 2506.02572; transformers' ``AttentionInterface`` and ``Cache``.

    Args:
        model: A text-only decoder whose layers all attend to the whole context: the Llama family,
            Qwen2, Qwen3, Mistral without a sliding window, and others built like them.
        config: The settings.
        weights: Hash weights for this model; None draws random orthogonal ones (seed 0), which
            select less well than trained ones, and warns.
        max_seq_len: Tokens of prompt and answer together that the cache has room for, at most the
            model's ``max_position_embeddings``.
        page_size: Positions of a page, a power of two; None for a contiguous cache.
        observer: Called after each sparse layer's decoding step as ``observer(layer_idx, q, cache,
            indices, num_selected)``: q ``[batch, 1, num_heads, head_dim]``, cache the
            `hata.HataCache`, the rest as `HataCache.last_selection` gives it.

    Returns:
        The cache to pass as ``past_key_values``; empty, and good for one ``generate`` at a time.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument breaks its rule, the model is not supported, or the weights are of
            another shape; the model is then unchanged.
    """
    where = f"{_HERE}.enable"
    check_type(isinstance(model, PreTrainedModel), where, "model", "be a PreTrainedModel", model)
    check_type(isinstance(config, HataConfig), where, "config", "be a HataConfig", config)
    num_layers, num_kv_heads, head_dim = _model_shape(where, model)
    positions = model.config.max_position_embeddings
    check_int(where, "max_seq_len", max_seq_len, 1, positions)
    if page_size is not None:
        check_page_size(where, page_size)
    callable_observer = observer is None or callable(observer)
    check_type(callable_observer, where, "observer", "be callable", observer)
    layer_bits = config.layer_bits(num_layers)
    config.layer_top_k(num_layers)  # raises where it names another number of layers
    if weights is not None:
        check_type(isinstance(weights, HashWeights), where, "weights", "be HashWeights", weights)
        sizes = (num_layers, num_kv_heads, head_dim)
        weights.check_fits(where, "model and config", sizes, layer_bits)
    else:
        warnings.warn(
            f"hata.{where}: weights is None, so keys are hashed with random orthogonal weights "
            "(seed 0); weights trained for the model select better",
            stacklevel=2,
        )
        weights = HashWeights.random(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_bits=layer_bits,
        )
    group = LayerGroup(config, weights, max_seq_len, page_size, observer)
    cache = HataTransformersCache(group)
    model.set_attn_implementation("hata")
    return cache


def _model_shape(function: str, model: PreTrainedModel) -> tuple[int, int, int]:
    """Returns (num_layers, num_kv_heads, head_dim) of a model that hata can run, or raises."""
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
    shape = model_shape(model)
    return shape["num_layers"], shape["num_kv_heads"], shape["head_dim"]


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
    check(layer is not None, _HERE, "past_key_values", rule, "another cache, or none")
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
