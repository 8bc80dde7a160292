"""cache_write: new tokens into rows that they name themselves."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def cache_write(
    k: Tensor,
    v: Tensor,
    key_weights: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes keys and values, the keys' codes and their norms to the rows that the tokens name.

    ``cache_append`` for a ragged batch in which an engine has laid out the rows: token ``j`` goes
    to row ``slot_mapping[j] % page_size`` of page ``slot_mapping[j] // page_size``, and nowhere
    if that is negative (vLLM's slot mapping). Codes and norms are those of ``hash_encode``,
    float8 caches are written as there.

    Args:
        k: New keys after position embedding, ``[num_tokens, num_kv_heads, head_dim]``, dtype of the
            caches, or any float's beside float8 caches; any strides, last dimension contiguous.
        v: New values, the same.
        key_weights: ``[num_kv_heads, head_dim, num_bits]``, dtype of ``k``, contiguous.
        k_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, float16, bfloat16 (float32 too
            on CPU) or float8_e4m3fn; ``page_size`` a power of two. Written.
        v_cache: The same. Written.
        code_cache: ``[num_pages, num_kv_heads, page_size, num_bits // 32]``, int32. Written.
        norm_cache: ``[num_pages, num_kv_heads, page_size]``, float16, or None. Written.
        slot_mapping: ``[num_tokens]``, int64, contiguous; no row twice.
        k_scale: Of a float8 cache: a key is what its row holds times this. ``[num_kv_heads]`` or
            one number for all, float32, on the device. None: 1.
        v_scale: The same for values.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride or device is not as above; on CPU also a slot past the
            last page. Nothing has been written then.
    """
    torch.ops.hata.cache_write.default(
        k,
        v,
        key_weights,
        k_cache,
        v_cache,
        code_cache,
        norm_cache,
        slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
    )


@torch.library.register_fake("hata::cache_write")
def _(
    k: Tensor,
    v: Tensor,
    key_weights: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    return None
