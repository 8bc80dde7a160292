"""hamming_score: planes against the code cache."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def hamming_score(
    planes: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    weight_sum: int,
    max_seq_len: int,
) -> Tensor:
    """Scores every cached key code against the queries' planes; larger means nearer.

    ``scores[b, j, h, t] = sum_p w_p (num_bits - 2 popcount(code[b, h, t] ^ planes[b, j, h, p]))``,
    which is ``c @ b`` of ``encode_query``'s integer vector c and the key's code b; with 1 query bit
    the Hamming score of HATA (arXiv 2506.02572, algorithm 3), summed over the group. With norms, as
    in the authors' runs: ``(score / num_bits) * norm``, in this order in float32, rounded once to
    float16.

    Args:
        planes: ``[batch, q_len, num_kv_heads, num_planes, num_words]``, int32, contiguous, of
            ``encode_query``.
        code_cache: ``[num_pages, num_kv_heads, page_size, num_words]``, int32.
        norm_cache: ``[num_pages, num_kv_heads, page_size]``, float16; or None.
        block_table: ``[batch, max_pages]``, int32.
        cache_seqlens: ``[batch]``, int32, the ``q_len`` query tokens included.
        weight_sum: ``plane_weight_sum(query_bits, group)`` of the planes, 1..255.
        max_seq_len: Width of the scores; positions from here on are not scored.

    Returns:
        ``scores`` ``[batch, q_len, num_kv_heads, max_seq_len]``: int32, or float16 with norms.
        Positions that query token ``j`` does not see hold -2**31, or -infinity.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride, device or ``weight_sum`` is not as above; on CPU also
            a length or page out of range.
    """
    return torch.ops.hata.hamming_score.default(
        planes, code_cache, norm_cache, block_table, cache_seqlens, weight_sum, max_seq_len
    )


@torch.library.register_fake("hata::hamming_score")
def _(
    planes: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    weight_sum: int,
    max_seq_len: int,
) -> Tensor:
    batch, q_len, num_kv_heads, _, _ = planes.shape
    dtype = torch.int32 if norm_cache is None else torch.float16
    return planes.new_empty((batch, q_len, num_kv_heads, max_seq_len), dtype=dtype)
