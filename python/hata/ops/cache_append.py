"""cache_append: new tokens into the caches."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def cache_append(
    k: Tensor,
    v: Tensor,
    key_weights: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor | None,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    new_seqlens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes new keys and values, the keys' codes and their norms to the last positions.

    Token ``j`` of ``q_len`` goes to position ``cache_seqlens[b] - q_len + j``, for one token as for
    a whole prompt; codes and norms are those of ``hash_encode`` (HATA, arXiv 2506.02572, algorithms
    1 and 3). Tokens with a negative position are the left padding of a ragged batch: they are not
    written.

    Without ``key_weights`` and ``code_cache`` keys and values are all that is written, for layers
    that do not select.

    A float8 cache (e4m3 without infinities, as vLLM and FlashInfer write it) gets ``k / k_scale``
    and ``v / v_scale``, rounded to nearest even and at most 448 in magnitude; the codes are of
    ``k`` as it was before.

    Args:
        k: New keys after position embedding, ``[batch, q_len, num_kv_heads, head_dim]``, dtype of
            the caches, or any float's beside float8 caches; any strides, last dimension contiguous.
        v: New values, the same.
        key_weights: ``[num_kv_heads, head_dim, num_bits]``, dtype of ``k``, contiguous; or None.
        k_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, float16, bfloat16 (float32 too
            on CPU) or float8_e4m3fn. Written.
        v_cache: The same. Written.
        code_cache: ``[num_pages, num_kv_heads, page_size, num_bits // 32]``, int32, written;
            or None, with and only with ``key_weights``.
        norm_cache: ``[num_pages, num_kv_heads, page_size]``, float16, written; or None, as without
            codes it must be.
        block_table: ``[batch, max_pages]``, int32. No page may be another sequence's as well.
        cache_seqlens: ``[batch]``, int32: lengths after this call.
        new_seqlens: ``[batch]``, int32: only the last ``new_seqlens[b]`` of the ``q_len`` tokens
            are new, the others are padding. Default: all are new.
        k_scale: Of a float8 cache: a key is what its row holds times this. ``[num_kv_heads]`` or
            one number for all, float32, on the device. None: 1.
        v_scale: The same for values.

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
        k_scale=k_scale,
        v_scale=v_scale,
    )


@torch.library.register_fake("hata::cache_append")
def _(
    k: Tensor,
    v: Tensor,
    key_weights: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor | None,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    new_seqlens: Tensor | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    return None
