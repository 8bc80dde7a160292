"""cache_append: new tokens into the caches."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def cache_append(
    k: Tensor,
    v: Tensor,
    key_weights: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    new_seqlens: Tensor | None = None,
) -> None:
    """Writes new keys and values, the keys' codes and their norms to the last positions.

    Token ``j`` of ``q_len`` goes to position ``cache_seqlens[b] - q_len + j``, for one token as for
    a whole prompt; codes and norms are those of ``hash_encode`` (HATA, arXiv 2506.02572, algorithms
    1 and 3). Tokens with a negative position are the left padding of a ragged batch: they are not
    written.

    Args:
        k: New keys after position embedding, ``[batch, q_len, num_kv_heads, head_dim]``, dtype of
            the caches; any strides, last dimension contiguous.
        v: New values, the same.
        key_weights: ``[num_kv_heads, head_dim, num_bits]``, dtype of the caches, contiguous.
        k_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, float16 or bfloat16 (float32
            too on CPU). Written.
        v_cache: The same. Written.
        code_cache: ``[num_pages, num_kv_heads, page_size, num_bits // 32]``, int32. Written.
        norm_cache: ``[num_pages, num_kv_heads, page_size]``, float16, written; or None.
        block_table: ``[batch, max_pages]``, int32. No page may be another sequence's as well.
        cache_seqlens: ``[batch]``, int32: lengths after this call.
        new_seqlens: ``[batch]``, int32: only the last ``new_seqlens[b]`` of the ``q_len`` tokens
            are new, the others are padding. Default: all are new.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride or device is not as above; on CPU also a length or page
            out of range. Nothing has been written then.
    """
    torch.ops.hata.cache_append.default(
        k,
        v,
        key_weights,
        k_cache,
        v_cache,
        code_cache,
        norm_cache,
        block_table,
        cache_seqlens,
        new_seqlens,
    )


@torch.library.register_fake("hata::cache_append")
def _(
    k: Tensor,
    v: Tensor,
    key_weights: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    new_seqlens: Tensor | None = None,
) -> None:
    return None
