"""gather_attention: exact attention over selected positions."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def gather_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    indices: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends to the positions in ``indices`` alone, whoever selected them.

    For query head ``i`` of KV head ``h``'s group, over the positions t in ``indices[b, j, h]``:
    ``out = sum_t softmax_t(softmax_scale * q @ k_t) v_t`` and ``lse = ln sum_t exp(softmax_scale *
    q @ k_t)``, softmax in float32 (HATA, arXiv 2506.02572, algorithm 3). Positions may come in any
    order; those below 0, or not below what query token ``j`` sees, are skipped. Where none is left,
    ``out`` is 0 and ``lse`` -infinity.

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
        indices: ``[batch, q_len, num_kv_heads, top_k]``, int32, contiguous; each position at most
            once.
        softmax_scale: Default: ``head_dim ** -0.5``.
        softcap: Turns each logit into ``softcap * tanh(logit / softcap)``, as Gemma 2 has it; above
            0. None: logits stay.
        k_scale: Of a float8 cache: a key is what its row holds times this. ``[num_kv_heads]`` or
            one number for all, float32, on the device. None: 1.
        v_scale: The same for values.

    Returns:
        ``out`` ``[batch, q_len, num_heads, head_dim]``, dtype of ``q``; and ``lse`` ``[batch,
        q_len, num_heads]``, float32, natural logarithm.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride or device is not as above; on CPU also a length or page
            out of range.
    """
    return torch.ops.hata.gather_attention.default(
        q,
        k_cache,
        v_cache,
        block_table,
        cache_seqlens,
        indices,
        softmax_scale,
        softcap,
        k_scale=k_scale,
        v_scale=v_scale,
    )


@torch.library.register_fake("hata::gather_attention")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    indices: Tensor,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
