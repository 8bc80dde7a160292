"""hata's attention function for transformers, by eager code and by compiled code.

It takes the `NewKeys` of a `HataTransformersCache`, and serves keys of every other kind, those of
the model's other layers and of passes without a cache, with transformers' "sdpa", or with
`hata.torch_attention` where logits are capped or there are sinks, which "sdpa" has not.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from hata.checks import check
from hata.integrations.transformers_layers import ATTENTION, AttendingLayer, NewKeys
from hata.integrations.transformers_mask import HERE, DeferredMask, mask_function
from hata.torch_attention import torch_attention


def torch_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends as transformers' "sdpa" does, and with a softcap and sink logits too.

    Args:
        module: The layer's attention.
        query: ``[batch, num_heads, q_len, head_dim]``.
        key: ``[batch, num_kv_heads, seq_len, head_dim]``.
        value: The same shape.
        attention_mask: ``[batch, 1 or num_heads, q_len, seq_len]``; None is causal.
        scaling: Factor of the logits; None is ``head_dim ** -0.5``.
        dropout: Probability that a share of the softmax is dropped.
        softcap: Cap of the logits, or None.
        s_aux: Sink logits, ``[num_heads]``, or None.
        kwargs: What "sdpa" takes besides.

    Returns:
        ``[batch, q_len, num_heads, head_dim]``, and no weights.
    """
    if softcap is None and s_aux is None:
        settings = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    out = torch_attention(
        *(query, key, value),
        softmax_scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        mask=attention_mask,
        is_causal=attention_mask is None,
        softcap=softcap,
        sink_logits=s_aux,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | NewKeys,
    value: Tensor,
    attention_mask: DeferredMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q, k, v are ``[batch, heads, length, head_dim]``."""
    check(kwargs.get("position_bias") is None, HERE, "position_bias", "be None", "a value")
    softcap, sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
    if not isinstance(key, NewKeys):
        mask = attention_mask
        if isinstance(mask, DeferredMask):
            mask = mask.for_sdpa
            mask = None if mask is None else mask.to(query.device)
        settings = {"dropout": dropout, "scaling": scaling, **kwargs}
        return torch_attention_forward(module, query, key, value, mask, **settings)
    shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else None
    check(shape is None, HERE, "attention_mask", "have two dimensions", shape)
    assert not isinstance(attention_mask, Tensor)  # what check has made sure of
    compiling = torch.compiler.is_compiling()
    if attention_mask is not None and not compiling:  # `enable` has seen it
        attention_mask.check_window(key.layer.window)
    check(dropout == 0.0, HERE, "dropout", "be 0 (call model.eval())", dropout)
    again = key.taken
    shared = getattr(module, "is_kv_shared_layer", False)  # transformers' word for such layers
    rule = "be attended to once, or by a layer that shares them"
    check(shared or not again, HERE, "the keys of a layer", rule, "another time")
    key.taken = True
    q, k, v = (x.transpose(1, 2) for x in (query, key.states, value))
    if torch.is_autocast_enabled(q.device.type):  # casts inputs of attention
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if not compiling:
        out = key.layer.attend(q, k, v, attention_mask, scaling, softcap, sink_logits, again)
        return out, None
    padding, kv_len = (None, 0) if attention_mask is None else attention_mask.padded
    logits = (scaling, softcap, sink_logits)
    return _attend_as_operator(q, k, v, padding, kv_len, *logits, key.layer.number, again), None


# What a layer does depends on lengths that change with every token. torch.compile sees none of it,
# or it would compile again for each; and CUDA graphs cannot replay it.
@torch.library.custom_op(
    "hata_transformers::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _attend_as_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    kv_len: int,
    softmax_scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    number: int,
    again: bool,
) -> Tensor:
    mask = DeferredMask({"attention_mask": padding, "kv_length": kv_len})
    layer = AttendingLayer.of_number(number)
    logits = (softmax_scale, softcap, sink_logits)
    return layer.attend(q, k, v, mask, *logits, again).contiguous()


@_attend_as_operator.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, mask_function)
