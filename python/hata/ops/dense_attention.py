"""dense_attention: exact attention over every visible position."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def dense_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    min_sparse_len: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends to every position that a query token sees, on the device's own lengths.

    For query token ``j`` of sequence ``b``, over all positions ``t < cache_seqlens[b] - q_len + j +
    1``: ``out = sum_t softmax_t(softmax_scale * q @ k_t) v_t`` and ``lse = ln sum_t
    exp(softmax_scale * q @ k_t)``, softmax in float32 (FlashAttention, arXiv 2205.14135, algorithm
    1). Where the token sees none, ``out`` is 0 and ``lse`` -infinity.

    For decoding: the sequence is split among blocks, nothing is copied, and a CUDA graph replays
    with other contents of ``cache_seqlens`` and ``block_table`` in the time that these lengths
    take. Keys and values are read once for each 16 query tokens and heads of a KV head.

    Args:
        q: ``[batch, q_len, num_heads, head_dim]``, dtype of the caches, or any float's beside
            float8 caches, where it is multiplied as float16 on CUDA; any strides, last dimension
            contiguous. Query head ``i`` belongs to KV head ``i // group``,
            ``group = num_heads // num_kv_heads``.
        k_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, float16, bfloat16 (float32 too
            on CPU) or float8_e4m3fn.
        v_cache: The same.
        block_table: ``[batch, max_pages]``, int32.
        cache_seqlens: ``[batch]``, int32, the ``q_len`` query tokens included.
        softmax_scale: Default: ``head_dim ** -0.5``.
        softcap: Turns each logit into ``softcap * tanh(logit / softcap)``, as Gemma 2 has it; above
            0. None: logits stay.
        min_sparse_len: Sequences of so many positions or more are left as they are in ``out`` and
            ``lse``, for ``decode_step`` to have attended to them sparsely; None: none are. At
            least 0.
        k_scale: Of a float8 cache: a key is what its row holds times this. ``[num_kv_heads]`` or
            one number for all, float32, on the device. None: 1.
        v_scale: The same for values.
        out: Where to write the output of that name, contiguous; allocated where missing, with 0 for
            sequences that are left.
        lse: The same, with -infinity.

    Returns:
        ``out`` ``[batch, q_len, num_heads, head_dim]``, dtype of ``q``; and ``lse`` ``[batch,
        q_len, num_heads]``, float32, natural logarithm; buffers that were given are returned as
        they are.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride, device or number is not as above; on CPU also a length
            or page out of range. Nothing has been written then.
    """
    if out is None:
        out = q.new_empty(q.shape) if min_sparse_len is None else q.new_zeros(q.shape)
    if lse is None:
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        if min_sparse_len is not None:
            lse.fill_(-torch.inf)
    torch.ops.hata.dense_attention.default(
        q,
        k_cache,
        v_cache,
        block_table,
        cache_seqlens,
        softmax_scale,
        softcap,
        min_sparse_len,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
        lse=lse,
    )
    return out, lse


@torch.library.register_fake("hata::dense_attention")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    min_sparse_len: int | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor,
    lse: Tensor,
) -> None:
    return None
