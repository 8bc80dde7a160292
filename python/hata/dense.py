"""Dense causal attention of a prompt, and how much of it a selection holds."""

import torch
from torch import Tensor

from hata.cache import HataCache
from hata.checks import check, check_int, check_tensor, check_type
from hata.torch_attention import check_logits, torch_attention


def check_dims(function: str, q: object) -> None:
    """Checks that queries are a tensor of four dimensions, for a public function."""
    check_type(isinstance(q, Tensor), function, "q", "be a tensor", q)
    assert isinstance(q, Tensor)  # what check_type has made sure of, for the type checker
    rule = "have shape [batch, q_len, num_heads, head_dim]"
    check(q.dim() == 4, function, "q", rule, list(q.shape))


def check_queries(function: str, q: Tensor, cache: HataCache, q_len: int | None = None) -> int:
    """Checks queries against a cache for a public function and returns their number of heads."""
    dims = (
        ("batch", cache.batch),
        ("q_len", q_len),
        ("num_heads", None),
        ("head_dim", cache.head_dim),
    )
    check_tensor(function, "q", q, dims, cache.dtype, cache.device)
    num_heads = q.shape[2]
    multiple = num_heads > 0 and num_heads % cache.num_kv_heads == 0
    rule = f"have a multiple of num_kv_heads={cache.num_kv_heads} heads"
    check(multiple, function, "q", rule, num_heads)
    return num_heads


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: HataCache,
    layer_idx: int,
    new: list[int],
    softmax_scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attends densely and causally over what the cache holds, with torch's attention.

    Sequences of one length go through one call. Those of a ragged batch go one by one, so that no
    sequence reads what lies past its end or before its start.

    Args:
        q: ``[batch, q_len, num_heads, head_dim]``, the queries of the last tokens in the cache.
        k: ``[batch, q_len, num_kv_heads, head_dim]``, their keys, which the cache holds too; a
            sequence that has no others is not read from the cache.
        v: The same shape.
        cache: The cache.
        layer_idx: The layer.
        new: How many of a sequence's last query tokens are real, ``[batch]``; the rest is padding.
        softmax_scale: Factor of the logits.
        softcap: Cap of the logits, or None.
        sink_logits: ``[num_heads]``, or None.

    Returns:
        ``[batch, q_len, num_heads, head_dim]`` in q's dtype; padding is 0.
    """

    def attend(tokens: tuple[slice, slice], batch_idx: int | None = None) -> Tensor:
        keys, values = k[tokens], v[tokens]
        if keys.shape[1] < cache.seq_lens[batch_idx or 0]:  # without batch_idx all are as long
            keys, values = cache.keys_values(layer_idx, batch_idx)
        out = torch_attention(
            *(t.transpose(1, 2) for t in (q[tokens], keys, values)),
            softmax_scale=softmax_scale,
            is_causal=True,
            softcap=softcap,
            sink_logits=sink_logits,
        )
        return out.transpose(1, 2)

    q_len = q.shape[1]
    if new == [q_len] * cache.batch and len(set(cache.seq_lens)) == 1:
        return attend((slice(None), slice(None)))
    out = torch.zeros_like(q)
    for b, count in enumerate(new):
        if count > 0:
            tokens = (slice(b, b + 1), slice(q_len - count, q_len))
            out[tokens] = attend(tokens, b)
    return out


def attention_mass(
    q: Tensor,
    cache: HataCache,
    layer_idx: int,
    indices: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Computes the share of the dense attention mass that selected positions hold.

    ``mass[b, j, i] = sum of softmax_t(softmax_scale q[b, j, i] . k_t) over the positions t in
    indices[b, j, h]``, h the KV head of query head i, the softmax over every position that token j
    sees. It costs as much as dense attention. What sink logits take is no position's, and is left
    out of the whole too.

    Args:
        q: ``[batch, q_len, num_heads, head_dim]``, the queries of the last ``q_len`` tokens in the
            cache, in its dtype.
        cache: The cache; it already holds those tokens.
        layer_idx: The layer.
        indices: ``[batch, q_len, num_kv_heads, top_k]``, int32, distinct positions or negative for
            none; those that the token does not see count nothing.
        softmax_scale: Factor of the logits; None is ``head_dim ** -0.5``.
        softcap: Cap of the logits, above 0; None: they stay.

    Returns:
        ``[batch, q_len, num_heads]``, float32, in 0..1; 0 where a token sees nothing.

    Raises:
        TypeError: An argument has another type.
        ValueError: A shape, dtype or device is not as above.
    """
    where = "attention_mass"
    check_int(where, "layer_idx", layer_idx, 0, cache.num_layers - 1)
    num_heads = check_queries(where, q, cache)
    check_logits(where, q, softcap, None)
    q_len, num_kv_heads = q.shape[1], cache.num_kv_heads
    dims = (
        ("batch", cache.batch),
        ("q_len", q_len),
        ("num_kv_heads", num_kv_heads),
        ("top_k", None),
    )
    check_tensor(where, "indices", indices, dims, torch.int32, cache.device)
    scale = cache.head_dim**-0.5 if softmax_scale is None else softmax_scale
    group = num_heads // num_kv_heads

    mass = torch.zeros(q.shape[:3], dtype=torch.float32, device=cache.device)
    for b, seq_len in enumerate(cache.seq_lens):
        if seq_len == 0:
            continue
        k, _ = cache.keys_values(layer_idx, b)
        heads = q[b].float().unflatten(1, (num_kv_heads, group))
        logits = torch.einsum("jhgd,thd->jhgt", heads, k[0].float()) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        last = torch.arange(seq_len - q_len, seq_len, device=cache.device)  # what token j sees
        seen = torch.arange(seq_len, device=cache.device) <= last[:, None]
        shares = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        chosen = indices[b].long()
        inside = (chosen >= 0) & (chosen < seq_len)
        rows = chosen.clamp(0, seq_len - 1)[:, :, None].expand(-1, -1, group, -1)
        taken = shares.gather(-1, rows) * inside[:, :, None]
        mass[b] = taken.sum(-1).flatten(1)
    return mass
