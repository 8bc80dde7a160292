"""decode_step: one layer's sparse attention in one operator."""

from typing import NamedTuple

import torch
from torch import Tensor

from hata.ops.inference import inference_only


class DecodeStepOutput(NamedTuple):
    """What one decoding step of one layer gives.

    Attributes:
        out: ``[batch, q_len, num_heads, head_dim]``, dtype of ``q``.
        lse: ``[batch, q_len, num_heads]``, float32, natural logarithm.
        indices: ``[batch, q_len, num_kv_heads, min(top_k, max_pages * page_size)]``, int32:
            ascending, then -1.
        num_selected: ``[batch, q_len, num_kv_heads]``, int32.
    """

    out: Tensor
    lse: Tensor
    indices: Tensor
    num_selected: Tensor


@inference_only
def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weights: Tensor,
    query_weights: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    query_bits: int,
    top_k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    workspace: Tensor | None = None,
    last_score: Tensor | None = None,
    num_ties: Tensor | None = None,
    indices: Tensor | None = None,
    num_selected: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> DecodeStepOutput:
    """Appends the new tokens, selects positions for their queries and attends to them.

    The fast path: ``cache_append``, ``encode_query``, ``score_select`` and ``gather_attention`` in
    turn (HATA, arXiv 2506.02572, algorithm 3), with the same results, in the fewest launches. With
    all five buffers given it allocates nothing and can be captured in a CUDA graph, which replays
    with other contents of ``cache_seqlens`` and ``block_table``.

    On CUDA the hash weights may be read before the kernel launched before this operator has ended,
    if that kernel lets its successor start early (programmatic dependent launch): it must not be
    the one that writes them.

    Args:
        q: Queries after position embedding, ``[batch, q_len, num_heads, head_dim]``, dtype of the
            caches, or any float's beside float8 caches (see ``cache_append`` and
            ``gather_attention``); any strides, last dimension contiguous.
        k: New keys after position embedding, ``[batch, q_len, num_kv_heads, head_dim]``, the same,
            dtype of ``q``.
        v: New values, the same.
        key_weights: ``[num_kv_heads, head_dim, num_bits]``, dtype of ``q``, contiguous.
        query_weights: The same; may be ``key_weights`` itself.
        k_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, float16, bfloat16 (float32 too
            on CPU) or float8_e4m3fn. Written.
        v_cache: The same. Written.
        code_cache: ``[num_pages, num_kv_heads, page_size, num_bits // 32]``, int32. Written.
        norm_cache: ``[num_pages, num_kv_heads, page_size]``, float16, written and used in the
            scores; or None.
        block_table: ``[batch, max_pages]``, int32.
        cache_seqlens: ``[batch]``, int32: lengths with the ``q_len`` new tokens.
        query_bits: 1 to 4, see ``encode_query``.
        top_k: Positions to select, at least 1; may exceed the sequence's length.
        num_sink: Positions at the start that are always selected.
        num_recent: Visible positions at the end that are always selected; ``num_sink + num_recent``
            is at most ``top_k``, or ``min_top_k`` where there is a share.
        top_k_share: A token selects this share of the positions that it sees, rounded up, but at
            least ``min_top_k`` and at most ``top_k``. Above 0 and below 1, and taken down to a
            multiple of 2 ** -32. None: every token selects ``top_k``.
        min_top_k: The least number with a share, ``1..top_k``; None is ``num_sink + num_recent``,
            and at least 1. Without a share it must be None.
        softmax_scale: Default: ``head_dim ** -0.5``.
        softcap: Turns each logit into ``softcap * tanh(logit / softcap)``, as Gemma 2 has it; above
            0. None: logits stay.
        k_scale: Of a float8 cache: a key is what its row holds times this. ``[num_kv_heads]`` or
            one number for all, float32, on the device. None: 1.
        v_scale: The same for values.
        workspace: uint8, 1-D, contiguous, at least ``workspace_size(batch, q_len, num_heads,
            num_kv_heads, head_dim, max_pages * page_size, top_k)`` bytes; allocated where missing.
        last_score: Where to write what ``score_select`` returns by that name, of the shape of
            ``num_selected``, int32, or float16 with norms, contiguous. None: nowhere.
        num_ties: The same, int32.
        indices: Where to write the output of that name, contiguous; allocated where missing.
        num_selected: The same.
        out: The same.
        lse: The same.

    Returns:
        The outputs; buffers that were given are returned as they are.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride, device or size is not as above; on CPU also a length
            or page out of range. Nothing has been written then.
    """
    # Shapes that the operator rejects come to buffers that are not used.
    if indices is None:
        capacity = block_table.shape[-1] * k_cache.shape[1]
        width = max(min(top_k, capacity), 0)
        indices = q.new_empty((*k.shape[:-1], width), dtype=torch.int32)
    if num_selected is None:
        num_selected = q.new_empty(k.shape[:-1], dtype=torch.int32)
    if out is None:
        out = q.new_empty(q.shape)
    if lse is None:
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    # By position what can be: torch takes longer to read an argument that comes by name.
    torch.ops.hata.decode_step.default(
        q,
        k,
        v,
        key_weights,
        query_weights,
        k_cache,
        v_cache,
        code_cache,
        norm_cache,
        block_table,
        cache_seqlens,
        query_bits,
        top_k,
        num_sink,
        num_recent,
        top_k_share,
        min_top_k,
        softmax_scale,
        softcap,
        k_scale,
        v_scale,
        workspace,
        last_score,
        num_ties,
        indices=indices,
        num_selected=num_selected,
        out=out,
        lse=lse,
    )
    return DecodeStepOutput(out, lse, indices, num_selected)


@torch.library.register_fake("hata::decode_step")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weights: Tensor,
    query_weights: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    query_bits: int,
    top_k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    workspace: Tensor | None = None,
    last_score: Tensor | None = None,
    num_ties: Tensor | None = None,
    *,
    indices: Tensor,
    num_selected: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    return None
