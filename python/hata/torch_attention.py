"""Attention in torch, with two things that its own lacks: a softcap and sink logits.

A *softcap* turns each logit into ``softcap * tanh(logit / softcap)`` (Gemma 2, arXiv 2408.00118,
section 2). A *sink logit* is one number a query head that enters the softmax's denominator and
nothing else: ``shares_t = exp(logit_t) / (exp(sink) + sum_u exp(logit_u))`` (gpt-oss, arXiv
2508.10925, section 2.2, after arXiv 2309.17453). It is not capped. Neither changes which keys have
the largest logits. The ``num_sink`` first positions, which a selection always holds, are something
else.
"""

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import dropout, pad, scaled_dot_product_attention

from hata.checks import check, check_type

# Capped logits are computed for so many tokens at a time that there are about 2^26 of them.
MAX_LOGITS = 2**26
# A multiple of 8 channels is what the fast kernels of scaled_dot_product_attention take as it is.
SINK_CHANNELS = 8


def check_logits(
    function: str, q: Tensor, softcap: float | None, sink_logits: Tensor | None
) -> None:
    """Checks a softcap and sink logits against queries, for a public function.

    Args:
        function: The public function.
        q: ``[batch, q_len, num_heads, head_dim]``.
        softcap: What must be None or a number above 0.
        sink_logits: What must be None or ``[num_heads]`` floats on q's device.
    """
    if softcap is not None:
        check_type(isinstance(softcap, float | int), function, "softcap", "be a number", softcap)
        check(softcap > 0, function, "softcap", "be above 0", softcap)
    if sink_logits is not None:
        is_tensor = isinstance(sink_logits, Tensor)
        check_type(is_tensor, function, "sink_logits", "be a tensor", sink_logits)
        shape, rule = list(sink_logits.shape), f"have shape [num_heads={q.shape[2]}]"
        check(shape == [q.shape[2]], function, "sink_logits", rule, shape)
        dtype, device = sink_logits.dtype, sink_logits.device
        check(dtype.is_floating_point, function, "sink_logits", "be of a floating dtype", dtype)
        check(device == q.device, function, "sink_logits", f"be on {q.device}", device)


def add_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor) -> None:
    """Lets sink logits into attention that is finished, in place.

    ``out *= exp(lse - lse')`` and ``lse = lse'``, ``lse' = ln(exp(lse) + exp(sink))``: a sink is a
    set of keys to be merged (`hata.ops.merge_attention_states`) whose values are 0. Allocates only
    small tensors and waits for nothing, so that a CUDA graph can hold it.

    Args:
        out: ``[batch, q_len, num_heads, head_dim]``. Written.
        lse: ``[batch, q_len, num_heads]``, float32. Written.
        sink_logits: ``[num_heads]``; -infinity for none, where lse is not.
    """
    sink = sink_logits.to(lse.dtype)
    out.mul_(torch.sigmoid(lse - sink)[..., None])
    torch.logaddexp(lse, sink, out=lse)


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attends with torch's kernels, as `torch.nn.functional.scaled_dot_product_attention` does.

    A sink logit becomes one more key, which every token sees: its value is 0, and its logit is what
    additional channels of the query hold. Capped logits have no kernel in torch; they are computed
    for some tokens at a time, in float32. Gradients flow through both.

    Args:
        q: ``[batch, num_heads, q_len, head_dim]``.
        k: ``[batch, num_kv_heads, seq_len, head_dim]``; ``num_heads`` is a multiple of
            ``num_kv_heads``.
        v: The same shape.
        softmax_scale: Factor of the logits.
        mask: True where a token sees a key, or floats that are added to the logits; it broadcasts
            to ``[batch, num_heads, q_len, seq_len]``, with the queries of all tokens.
        is_causal: Whether the queries are the last ``q_len`` tokens, each of which sees itself and
            what is before it; then there is no mask.
        softcap: Cap of the logits, above 0; None: they stay.
        sink_logits: ``[num_heads]``; None: there are none.
        dropout_p: Probability that a share of the softmax is dropped.

    Returns:
        ``[batch, num_heads, q_len, head_dim]`` in q's dtype.
    """
    if q.shape[2] == 0:
        return torch.empty_like(q)
    if softcap is not None:
        return _capped_attention(
            q, k, v, softmax_scale, mask, is_causal, softcap, sink_logits, dropout_p
        )
    head_dim = q.shape[3]
    if sink_logits is not None:
        q = torch.cat([q, _sink_queries(q, sink_logits, softmax_scale)], dim=3)
        k, v = (pad(t, (0, SINK_CHANNELS, 1, 0)) for t in (k, v))
        k[:, :, 0, head_dim:] = 1
        mask = None if mask is None else pad(mask, (1, 0), value=mask.dtype == torch.bool)
    if mask is not None or (q.is_cuda and q.dtype == torch.float32):
        # CUDA's kernels that take a mask, and those for float32, know no groups; torch would form
        # the matrix of logits.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    q_len, seq_len = q.shape[2], k.shape[2]
    is_causal = is_causal and q_len > 1
    attn_mask = causal_lower_right(q_len, seq_len) if is_causal and q_len < seq_len else mask
    out = scaled_dot_product_attention(
        *(q, k, v),
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal and q_len == seq_len,
        scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., :head_dim]


def _sink_queries(q: Tensor, sink_logits: Tensor, softmax_scale: float) -> Tensor:
    """Returns channels that sum to the sink logits over the scale, ``[..., SINK_CHANNELS]``.

    The first is the number rounded to q's dtype, the next what that has lost, and so on: two
    channels of bfloat16 hold 16 bits. The last ones are 0. What q's dtype cannot hold, -infinity
    too, becomes its largest number: times the 0 of all other keys it must not be NaN.
    """
    largest = torch.finfo(q.dtype).max
    rest = sink_logits.to(torch.promote_types(q.dtype, torch.float32)) / softmax_scale
    rest = rest.clamp(-largest, largest)
    channels = []
    for _ in range(SINK_CHANNELS):
        channels.append(rest.to(q.dtype))
        rest = rest - channels[-1].to(rest.dtype)
    parts = torch.stack(channels, dim=-1)  # [num_heads, SINK_CHANNELS]
    return parts[:, None].expand(*q.shape[:3], SINK_CHANNELS)


def _capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    mask: Tensor | None,
    is_causal: bool,
    softcap: float,
    sink_logits: Tensor | None,
    dropout_p: float,
) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, num_heads, q_len, _ = q.shape
    num_kv_heads, seq_len = k.shape[1:3]
    # [batch, num_kv_heads, group, q_len, head_dim]
    groups = q.to(dtype).unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    keys, values = k.to(dtype).mT, v.to(dtype)
    num_tokens = max(1, MAX_LOGITS // (batch * num_heads * seq_len))
    outs = []
    for first in range(0, q_len, num_tokens):
        tokens = slice(first, first + num_tokens)
        last = torch.arange(seq_len - q_len, seq_len, device=q.device)[tokens]
        visible = seq_len - q_len + min(first + num_tokens, q_len) if is_causal else seq_len
        part = groups[:, :, :, tokens]
        logits = (part.flatten(2, 3) @ keys[..., :visible]).unflatten(2, part.shape[2:4])
        logits = softcap * torch.tanh(logits * (softmax_scale / softcap))
        seen = mask
        if mask is not None:
            seen = mask[..., tokens, :].expand(-1, num_heads, -1, -1)
            seen = seen.unflatten(1, groups.shape[1:3])
        if is_causal:
            seen = torch.arange(visible, device=q.device) <= last[:, None]
        if seen is not None and seen.dtype == torch.bool:
            # A finite number: padding may see nothing, and must not become NaN.
            logits = logits.masked_fill(~seen, torch.finfo(dtype).min)
        elif seen is not None:
            logits = logits + seen
        if sink_logits is not None:
            sinks = sink_logits.to(dtype).view(num_kv_heads, -1, 1, 1)
            logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], dim=-1)
        shares = dropout(logits.softmax(-1)[..., :visible], dropout_p)
        attended = shares.flatten(2, 3) @ values[:, :, :visible]
        outs.append(attended.unflatten(2, part.shape[2:4]).flatten(1, 2).to(q.dtype))
    return torch.cat(outs, dim=2)
