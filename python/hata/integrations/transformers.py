"""transformers models with hata attention: ``enable(model)``, then ``model.generate(...)``.

`enable` works through transformers' public interfaces, an attention function
(`hata.integrations.transformers_attention`), a mask function and a `Cache`
(`hata.integrations.transformers_cache`), and one method of the model: where `generate` prepares its
cache.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

import hata.integrations.transformers_attention  # noqa: F401  (registers itself)
from hata.checks import check, check_int, check_type
from hata.config import HataConfig
from hata.integrations.model_shape import (
    ModelShape,
    full_attention_layers,
    model_shape,
    tensor_parallel_shard,
    unlike_layers,
    window_layers,
)
from hata.integrations.transformers_cache import CACHE_ARGUMENT, HataTransformersCache
from hata.integrations.transformers_generate import stand_ins
from hata.integrations.transformers_graphs import DecodeGraphs, graphed_forward
from hata.integrations.transformers_layers import ATTENTION, MAX_DRAFT_LEN, AttendingLayer
from hata.integrations.transformers_mask import HERE
from hata.integrations.transformers_settings import (
    CacheSettings,
    DecodeObserver,
    checked_host_memory,
    layers_by_device,
)
from hata.pretrained import find_pretrained
from hata.sequences import check_page_size
from hata.storage import check_kv_cache_dtype
from hata.weights import HashWeights, load_weights


@dataclass
class _Enabled:
    """What `disable` needs, and what `generate` makes caches from.

    Attributes:
        settings: What `enable` has settled.
        attention: The model's attention implementation before.
        hook: Of the model's forward pass.
        graphs: Of its decoding; None if it stays eager.
    """

    settings: CacheSettings
    attention: str
    hook: Any
    graphs: DecodeGraphs | None

    def remove_from(self, model: PreTrainedModel) -> None:
        """Takes out of the model what `enable` has put into it."""
        self.hook.remove()
        names = ["_hata", *stand_ins(model, self.settings)]
        for name in (*names, *(["forward"] if self.graphs is not None else [])):
            vars(model).pop(name, None)  # someone may have taken a forward pass back


def enable(
    model: PreTrainedModel,
    config: HataConfig | None = None,
    *,
    top_k: int | float | None = None,
    weights: HashWeights | str | PathLike[str] | None = None,
    max_seq_len: int | None = None,
    page_size: int | None = None,
    kv_cache_dtype: torch.dtype | None = None,
    offload: int | str | None = None,
    verify: str | None = None,
    num_draft_tokens: int = 3,
    observer: DecodeObserver | None = None,
    cuda_graphs: bool | None = None,
) -> HataTransformersCache:
    """Switches a model to hata attention and makes a cache for it.

    The prompt is attended to densely and exactly, as with "sdpa"; each token after it is decoded
    sparsely, except in the model's first ``config.num_dense_layers`` layers, and densely too while
    the sequence is shorter than ``config.min_sparse_len``, which by default is where a sparse step
    becomes the faster one::

        cache = enable(model, top_k=256)
        model.generate(**inputs, max_new_tokens=100)  # with a cache of its own
        model.generate(**inputs, max_new_tokens=100, cache=cache)  # with one to go on from

    Only layers that attend to the whole context decode sparsely. Those with a sliding window or
    with chunks attend to all of it, over a cache of hata's; those with a recurrent state stay as
    they are. A forward pass without a cache is dense, with
    gradients. Layers on several GPUs (``device_map``), or KV heads split among them (``tp_plan``),
    are attended to where they lie. `disable` makes the model what it was. docs/transformers.md says
    more: which models there are, padding, chunks and drafts. transformers before 5.24 calls the
    argument ``past_key_values``.

    Source: HATA, arXiv 2506.02572; transformers' ``AttentionInterface`` and ``Cache``.

    Args:
        model: A text-only decoder (docs/models.md). Two forward passes of one token show that its
            layers can be hata's.
        config: The budget; None is `HataConfig`'s defaults. It counts all layers of the model.
        top_k: Positions that each KV head attends to, or a share of the context, in place of
            ``config.top_k``.
        weights: Hash weights for this model's layers, or for those that become hata's, or a file
            of `hata.save_weights`. None takes the package's own for a model of this name and
            shape; where there are none it draws random orthogonal ones (64 bits, seed 0), which
            select less well than trained ones, and warns.
        max_seq_len: Tokens of prompt and answer together that the cache has room for, at most the
            model's ``max_position_embeddings``; None is that number. The memory for all of them is
            taken at the first forward pass; the caches of `generate` are as short as they can be.
        page_size: Positions of a page, a power of two; None for a contiguous cache.
        kv_cache_dtype: Of the keys and values in the cache: None for the model's, or
            ``torch.float8_e4m3fn``, with scales of 1, which halves the memory of 16-bit ones. A
            prompt sees its own keys and values as they came, all that follows as the cache has
            them.
        offload: Keeps keys and values in host memory, of which each cache takes at most as
            many bytes as this, or as "64GB" says (`hata.offload.OffloadedCache`). None keeps them
            on the GPU.
        verify: "dense": `generate` returns what the dense model would; tokens that are decoded
            sparsely are drafts, which a dense pass accepts or replaces. One sequence at a time.
            None: what is decoded sparsely is the text.
        num_draft_tokens: Tokens of a draft with ``verify``, ``1..31``.
        observer: Called after each sparse layer's decoding step as ``observer(layer_idx, q, cache,
            indices, num_selected)``: q ``[batch, q_len, num_heads, head_dim]``, cache the
            `hata.HataCache`, layer_idx its layer, the rest as `HataCache.last_selection` gives it;
            ``cache.last_cut(layer_idx)`` gives the score of the last position and its ties.
        cuda_graphs: Whether passes that decode are captured in CUDA graphs and replayed. None does
            it where it can be: on one GPU, where every layer has full, sliding-window, chunked or
            linear attention, without an observer; and
            warns if the model's own code then turns out to forbid it. True raises in place of that.

    Returns:
        The cache to pass to ``generate``; empty, and good for one ``generate`` at a time.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument breaks its rule, the model is not supported, or the weights are of
            another shape; the model is then unchanged.
        RuntimeError: When it decodes: ``cuda_graphs`` is True, and the model cannot be captured.
    """
    where = f"{HERE}.enable"
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
    check_kv_cache_dtype(where, kv_cache_dtype)
    callable_observer = observer is None or callable(observer)
    check_type(callable_observer, where, "observer", "be callable", observer)
    check(verify in (None, "dense"), where, "verify", 'be None or "dense"', verify)
    check_int(where, "num_draft_tokens", num_draft_tokens, 1, MAX_DRAFT_LEN - 1)
    layer_config = config.for_layers(layers, shape["num_layers"])
    chosen = _choose_weights(where, model, shape, layers, weights)
    windows = window_layers(model)
    settings = CacheSettings(
        model_config=model.config,
        config=config,
        weights=chosen,
        layers=layers,
        window_layers=tuple(windows),
        windows=tuple(windows.values()),
        layer_config=layer_config,
        layer_weights=chosen.for_model(where, **shape, layers=layers),
        max_seq_len=max_seq_len,
        page_size=page_size,
        kv_cache_dtype=kv_cache_dtype,
        host_memory=checked_host_memory(where, offload, len(layers), layer_config),
        observer=observer,
        devices=tuple((row,) for row in range(len(layers))),
        window_devices=tuple((row,) for row in range(len(windows))),
        shard=tensor_parallel_shard(model),
        num_draft_tokens=None if verify is None else num_draft_tokens,
    )
    check_type(cuda_graphs in (None, True, False), where, "cuda_graphs", "be a bool", cuda_graphs)
    before: _Enabled | None = vars(model).get("_hata")
    attention = model.config._attn_implementation if before is None else before.attention
    if cuda_graphs:
        _check_capturable(where, model, settings)
    plain = replace(
        settings, page_size=None, host_memory=None, observer=None, num_draft_tokens=None
    )
    tried = _try(where, model, plain)
    settings = replace(
        settings,
        devices=layers_by_device([cache.device for cache in tried.hata_caches]),
        window_devices=layers_by_device([cache.device for cache in tried.window_caches]),
    )
    if before is not None:
        before.remove_from(model)
    hook = model.register_forward_pre_hook(_check_cache, with_kwargs=True)
    graphs = None
    whole = "forward" not in vars(model) and settings.shard[1] == 1
    if cuda_graphs is not False and whole:
        graphs = DecodeGraphs(required=cuda_graphs is True)
        vars(model)["forward"] = graphed_forward(model)
    vars(model)["_hata"] = _Enabled(settings, attention, hook, graphs)
    for name, method in stand_ins(model, settings).items():
        vars(model)[name] = MethodType(method, model)
    return HataTransformersCache(settings, max_seq_len)


def disable(model: PreTrainedModel) -> None:
    """Makes the model what it was before `enable`; one that is not enabled stays as it is.

    Args:
        model: The model. Its hata caches are of no more use.
    """
    enabled: _Enabled | None = vars(model).get("_hata")
    if enabled is not None:
        enabled.remove_from(model)
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


def _check_cache(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Runs before the model's forward pass."""
    if model.config._attn_implementation != ATTENTION:
        return
    for name in ("cache", "past_key_values"):
        cache = kwargs.get(name)
        fits = cache is None or isinstance(cache, HataTransformersCache)
        check(fits, HERE, name, "be None or what enable() returned", type(cache).__name__)


def _choose_weights(
    function: str,
    model: PreTrainedModel,
    shape: ModelShape,
    layers: tuple[int, ...],
    weights: HashWeights | str | PathLike[str] | None,
) -> HashWeights:
    if weights is None:
        found = find_pretrained(Path(model.name_or_path or "").name, **shape, layers=layers)
        if found is not None:
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


def _check_capturable(function: str, model: PreTrainedModel, settings: CacheSettings) -> None:
    """Raises ValueError if decoding cannot be captured, whatever the model's code is."""
    before: _Enabled | None = vars(model).get("_hata")
    replaced = "forward" in vars(model) and (before is None or before.graphs is None)
    for holds, rule in (
        (model.device.type == "cuda", "be on a GPU"),
        (not replaced and settings.shard[1] == 1, "run its own forward pass, on one GPU"),
        (
            not unlike_layers(model),
            "have layers of full, sliding-window, chunked or linear attention alone",
        ),
    ):
        check(holds, function, "model", f"{rule} for cuda_graphs=True", type(model).__name__)
    rule, observer = "be None for cuda_graphs=True", settings.observer
    check(observer is None, function, "observer", rule, observer)


@torch.no_grad()
def _try(function: str, model: PreTrainedModel, settings: CacheSettings) -> HataTransformersCache:
    """Runs one token of prompt and one of answer, and leaves the model on hata's attention.

    What a model's attention does is written nowhere but in its code: extra inputs, heads of another
    size, keys that change after they were cached. So it is tried. Each layer has a cache of its own
    meanwhile.

    Returns:
        The cache: that of each layer lies where the layer's keys do.
    """
    before, name = model.config._attn_implementation, type(model).__name__
    training = [module for module in model.modules() if module.training]
    cache = HataTransformersCache(settings, min(2, settings.max_seq_len))
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    fits = False
    try:
        model.eval()
        model.set_attn_implementation(ATTENTION)
        for _ in range(cache.max_seq_len):
            model(token, use_cache=True, **{CACHE_ARGUMENT: cache})
        attended = [layer.seen for layer in cache.layers if isinstance(layer, AttendingLayer)]
        fits = attended == [cache.max_seq_len] * len(attended)
        rule = "call its attention function in every layer of full, windowed or chunked attention"
        check(fits, function, "model", rule, f"{name}, with {attended} calls")
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise ValueError(
            f"hata.{function}: model must attend as hata does, got {name}, in which one token "
            f"fails: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True
        if not fits:
            model.set_attn_implementation(before)
    return cache
