"""hata's attention function for transformers, by eager code and by compiled code.

It takes the `NewKeys` of a `HataTransformersCache`, and serves keys of every other kind with
transformers' "sdpa": those of the model's other layers and of passes without a cache.
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
    for name in ("softcap", "s_aux", "position_bias"):
        check(kwargs.get(name) is None, HERE, name, "be None", "a value")
    if not isinstance(key, NewKeys):
        mask = attention_mask
        if isinstance(mask, CausalMask):
            mask = mask.for_sdpa
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
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
        return key.layer.attend(q, k, v, attention_mask, scaling), None
    padding, kv_len = (None, 0) if attention_mask is None else attention_mask.padded
    return _attend_as_operator(q, k, v, padding, kv_len, scaling, key.layer.number), None


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
    number: int,
) -> Tensor:
    mask = CausalMask({"attention_mask": padding, "kv_length": kv_len})
    return HataLayer.of_number(number).attend(q, k, v, mask, softmax_scale).contiguous()


@_attend_as_operator.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, mask_function)
