"""Attention over a `HataCache`: dense prefill, and decoding that is sparse where that pays."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hata import ops
from hata.cache import HataCache
from hata.checks import check_type
from hata.dense import check_dims, check_queries, prompt_attention
from hata.torch_attention import add_sink_logits, check_logits


@torch.no_grad()
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: HataCache,
    layer_idx: int,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    new_seqlens: int | Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Appends a prompt, or the next chunk of one, and attends densely and causally.

    Token j of sequence b attends to everything the cache holds up to it. Inference only: no
    gradients.

    Source: HATA, arXiv 2506.02572, section 4 (dense prefill; keys are hashed as they are cached).

    Args:
        q: ``[batch, q_len, num_heads, head_dim]`` in the cache's dtype, after the rotary embedding.
        k: ``[batch, q_len, num_kv_heads, head_dim]``, likewise; last dimension contiguous.
        v: The same shape and dtype as k.
        cache: The cache; q, k and v lie on its device.
        layer_idx: The layer.
        softmax_scale: Factor of the logits; None is ``head_dim ** -0.5``.
        softcap: Turns each logit into ``softcap * tanh(logit / softcap)``, as Gemma 2 has it; above
            0. None: logits stay.
        sink_logits: ``[num_heads]``, a floating dtype: one more logit of each query head's softmax,
            uncapped, to which no value belongs, as gpt-oss has them. None: there are none.
        new_seqlens: ``[batch]`` ints: only the last ``new_seqlens[b]`` tokens of sequence b are
            real, those before are left padding. None: all are.

    Returns:
        ``[batch, q_len, num_heads, head_dim]`` in q's dtype; zeros for padding.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument breaks its rule, or the cache has no room; it is then unchanged.
        RuntimeError: The operator rejects a shape, dtype, device or stride; likewise.
    """
    where = "prefill"
    new = _new_tokens(where, cache, layer_idx, k, new_seqlens)
    check_queries(where, q, cache, k.shape[1])
    check_logits(where, q, softcap, sink_logits)
    cache.append(layer_idx, k, v, new_seqlens=None if new_seqlens is None else new)
    scale = _scale(cache, softmax_scale)
    return prompt_attention(q, k, v, cache, layer_idx, new, scale, softcap, sink_logits)


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: HataCache,
    layer_idx: int,
    *,
    dense: bool = False,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    seq_len_range: tuple[int, int] | None = None,
) -> Tensor:
    """Appends the new tokens and attends to the positions that their hash scores select.

    Layers below ``config.num_dense_layers`` attend to everything, by `hata.ops.dense_attention`.
    The others run `hata.ops.decode_step` into buffers that the cache owns, or what a
    `hata.offload.OffloadedCache` does in its place; those that ``config.share_selection`` lets
    share the selection of an earlier layer append their tokens and attend to it, after that layer
    in the same step.
    `HataCache.last_selection` tells what was selected; where a sequence has at most ``top_k``
    positions, that is all of them and the result is dense attention's. Inference only: no
    gradients.

    Sequences of fewer than ``cache.min_sparse_len`` positions, the new ones included, attend
    densely in every layer. Each sequence of a batch is judged by its own length: where some are
    long, the sparse step is run for all, and dense attention then replaces the results of the short
    ones.

    Lengths are the device's, and nothing waits for it, so that a CUDA graph can hold the layers of
    both kinds and replay for sequences of every length: call `HataCache.extend` and this function
    once to warm up, capture this function, and then, for every further token, call
    `HataCache.extend` and replay. A graph that is known to serve lengths of a ``seq_len_range``
    holds only what they need.

    Source: HATA, arXiv 2506.02572, algorithm 3.

    Args:
        q: ``[batch, q_len, num_heads, head_dim]`` in the cache's dtype, after the rotary embedding;
            ``num_heads`` is a multiple of ``num_kv_heads``. q_len is 1, or more where several
            tokens are verified at once; each token has its own selection.
        k: ``[batch, q_len, num_kv_heads, head_dim]``, likewise; last dimension contiguous.
        v: The same shape and dtype as k.
        cache: The cache; q, k and v lie on its device.
        layer_idx: The layer.
        dense: Whether to attend to everything in this layer too.
        softmax_scale: Factor of the logits; None is ``head_dim ** -0.5``.
        softcap: Turns each logit into ``softcap * tanh(logit / softcap)``, as Gemma 2 has it; above
            0. None: logits stay.
        sink_logits: ``[num_heads]``, a floating dtype: one more logit of each query head's softmax,
            uncapped, to which no value belongs, as gpt-oss has them. None: there are none.
        seq_len_range: Least and greatest length, the new tokens included, of the sequences that are
            decoded; None: what they are now, and any length where a CUDA graph is captured.

    Returns:
        ``[batch, q_len, num_heads, head_dim]`` in q's dtype. Where it is not dense it is a
        buffer that the layer's next call with this q_len overwrites.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument breaks its rule, the layer shares a selection that this step has
            not made, or the cache has no room; it is then unchanged.
        RuntimeError: The operator rejects a shape, dtype, device or stride; likewise.
    """
    where = "decode_attention"
    new = _new_tokens(where, cache, layer_idx, k)
    scale, config = _scale(cache, softmax_scale), cache.config
    caches = (cache.k_cache[layer_idx], cache.v_cache[layer_idx])
    tables = (cache.block_table, cache.cache_seqlens)
    k_scale, v_scale = cache.k_scale[layer_idx], cache.v_scale[layer_idx]
    if dense or layer_idx < config.num_dense_layers:
        check_queries(where, q, cache, k.shape[1])
        check_logits(where, q, softcap, sink_logits)
        cache.append(layer_idx, k, v)
        attended = ops.dense_attention(
            *(q, *caches, *tables),
            softmax_scale=scale,
            softcap=softcap,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        if sink_logits is not None:
            add_sink_logits(*attended, sink_logits)
        return attended[0]

    check_dims(where, q)
    check_logits(where, q, softcap, sink_logits)
    with cache._sequences.filling(where, layer_idx, new):
        buffers = cache._buffers.get(layer_idx, q.shape[1], q.shape[2])
        shortest, longest = seq_len_range or _seq_len_range(cache)
        if longest < cache.min_sparse_len:
            cache._write(layer_idx, k, v, None)
        else:
            buffers = cache._sparse_step(layer_idx, q, k, v, buffers, scale, softcap)
        if shortest < cache.min_sparse_len:
            ops.dense_attention(
                *(q, *caches, *tables),
                softmax_scale=scale,
                softcap=softcap,
                min_sparse_len=cache.min_sparse_len,
                k_scale=k_scale,
                v_scale=v_scale,
                out=buffers.out,
                lse=buffers.lse,
            )
    if sink_logits is not None:
        add_sink_logits(buffers.out, buffers.lse, sink_logits)
    cache._buffers.note(layer_idx, buffers, cache._sequences.num_steps)
    return buffers.out


def _seq_len_range(cache: HataCache) -> tuple[int, int]:
    """Lengths of the cache's sequences; those that a graph being captured will serve are any."""
    if cache.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return 0, cache.max_seq_len
    return min(cache.seq_lens), max(cache.seq_lens)


def _new_tokens(
    function: str,
    cache: HataCache,
    layer_idx: int,
    k: Tensor,
    new_seqlens: int | Sequence[int] | Tensor | None = None,
) -> list[int]:
    check_type(isinstance(cache, HataCache), function, "cache", "be a HataCache", cache)
    return cache._new_tokens(function, layer_idx, k, new_seqlens)


def _scale(cache: HataCache, softmax_scale: float | None) -> float:
    return cache.head_dim**-0.5 if softmax_scale is None else softmax_scale
