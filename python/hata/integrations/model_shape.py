"""The sizes of a transformers model's attention."""

from typing import Any, TypedDict


class ModelShape(TypedDict):
    """The sizes that hash weights depend on."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def model_shape(model: Any) -> ModelShape:
    """Reads the sizes from the model's config."""
    config = model.config.get_text_config(decoder=True)
    heads: int = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def softmax_scale(model: Any) -> float:
    """Returns the factor of the attention logits: the first layer's, else ``head_dim ** -0.5``."""
    scales = (m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), float))
    return next(scales, model_shape(model)["head_dim"] ** -0.5)
