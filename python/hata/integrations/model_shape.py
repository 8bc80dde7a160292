"""The sizes of a transformers model's attention, and which of its layers see the whole context."""

from typing import Any, TypedDict

from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from hata.window_attention import Window


class ModelShape(TypedDict):
    """The sizes that hash weights depend on."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def model_shape(model: Any) -> ModelShape:
    """Reads from the config the sizes of the layers that attend to the whole context.

    In Gemma 4 layers with a window have other heads.
    """
    config = model.config.get_text_config(decoder=True)
    if layers := full_attention_layers(model):
        config = config.per_layer_config[layers[0]]
    heads: int = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def own_cache_layers(config: Any) -> list[Any]:
    """Returns new cache layers as transformers makes them for a model with this config."""
    return DynamicCache(config=config).layers


def full_attention_layers(model: Any) -> tuple[int, ...]:
    """Returns the layers that attend to the whole context and to nothing else.

    They are those to which transformers gives its plain growing cache. Layers with a window, with
    chunks, or with a recurrent state have cache layers of their own.
    """
    layers = own_cache_layers(model.config)
    return tuple(i for i, layer in enumerate(layers) if type(layer) is DynamicLayer)


def window_layers(model: Any) -> dict[int, Window]:
    """Returns what tokens see, by layer, in layers with a sliding window or with chunks.

    Both have the same cache in transformers, and are told apart by the config.
    """
    known = ("sliding_attention", "chunked_attention")
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    layers = own_cache_layers(model.config)
    return {
        i: Window(layer.sliding_window, is_chunk=kind == "chunked_attention")
        for i, (layer, kind) in enumerate(zip(layers, kinds, strict=False))
        if type(layer) is DynamicSlidingWindowLayer and kind in known
    }


def unlike_layers(model: Any) -> tuple[int, ...]:
    """Returns the layers that keep something else than full, windowed or linear attention does.

    transformers' cache layers of linear attention keep a state of a fixed size, which they update
    in place, and those of layers that share another's keys nothing at all.
    """
    known = {*full_attention_layers(model), *window_layers(model)}
    kinds = (CacheLayerMixin, LinearAttentionCacheLayerMixin)
    return tuple(
        i
        for i, layer in enumerate(own_cache_layers(model.config))
        if i not in known and isinstance(layer, kinds) and type(layer) is not LinearAttentionLayer
    )


def softmax_scale(model: Any) -> float:
    """Returns the factor of the attention logits: the first layer's, else ``head_dim ** -0.5``."""
    scales = (m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), float))
    return next(scales, model_shape(model)["head_dim"] ** -0.5)


def softcap(model: Any) -> float | None:
    """Returns the cap of the attention logits: the first layer's, or None."""
    caps = (getattr(module, "attn_logit_softcapping", None) for module in model.modules())
    return next((cap for cap in caps if cap is not None), None)


def tensor_parallel_shard(model: Any) -> tuple[int, int]:
    """Returns which shard of split tensors this process holds, and how many there are."""
    size = model.tp_size or 1
    if size == 1:
        return 0, 1
    mesh = model._device_mesh  # transformers has no public name for it
    return int(mesh.get_local_rank("tp" if mesh.ndim > 1 else 0)), int(size)
