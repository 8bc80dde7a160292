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
from hata.integrations.transformers_cache import ATTENTION, HataLayer, NewKeys
from hata.integrations.transformers_mask import HERE, CausalMask, mask_function
from hata.torch_attention import torch_attention


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | NewKeys,
    value: Tensor,
    attention_mask: CausalMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q, k, v are ``[batch, heads, length, head_dim]``."""
    check(kwargs.get("position_bias") is None, HERE, "position_bias", "be None", "a value")
    softcap, sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
    if not isinstance(key, NewKeys):
        mask = attention_mask
        if isinstance(mask, CausalMask):
            mask = mask.for_sdpa
            mask = None if mask is None else mask.to(query.device)
        if softcap is None and sink_logits is None:
            return sdpa_attention_forward(
                module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
            )
        out = torch_attention(
            *(query, key, value),
            softmax_scale=query.shape[3] ** -0.5 if scaling is None else scaling,
            mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            softcap=softcap,
            sink_logits=sink_logits,
            dropout_p=dropout,
        )
        return out.transpose(1, 2).contiguous(), None
    rule, got = "be causal over the whole context", "another mask"
    check(not isinstance(attention_mask, Tensor), HERE, "attention_mask", rule, got)
    assert not isinstance(attention_mask, Tensor)  # what check has made sure of
    check(dropout == 0.0, HERE, "dropout", "be 0 (call model.eval())", dropout)
    check(not key.taken, HERE, "the keys of a layer", "be attended to once", "another time")
    key.taken = True
    q, k, v = (x.transpose(1, 2) for x in (query, key.states, value))
    if torch.is_autocast_enabled(q.device.type):  # casts inputs of attention
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if not torch.compiler.is_compiling():
        return key.layer.attend(q, k, v, attention_mask, scaling, softcap, sink_logits), None
    padding, kv_len = (None, 0) if attention_mask is None else attention_mask.padded
    logits = (scaling, softcap, sink_logits)
    return _attend_as_operator(q, k, v, padding, kv_len, *logits, key.layer.number), None


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
) -> Tensor:
    mask = CausalMask({"attention_mask": padding, "kv_length": kv_len})
    layer = HataLayer.of_number(number)
    return layer.attend(q, k, v, mask, softmax_scale, softcap, sink_logits).contiguous()


@_attend_as_operator.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, mask_function)
