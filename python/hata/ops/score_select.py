"""score_select: planes and the code cache to the best positions."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def score_select(
    planes: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    weight_sum: int,
    top_k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    return_cut: bool = False,
) -> tuple[Tensor, ...]:
    """Scores the code cache and selects the best positions in one operator.

    Equals ``select_topk(hamming_score(planes, ...), cache_seqlens, top_k=...)`` bit for bit (HATA,
    arXiv 2506.02572, algorithm 3), without the public score tensor.

    Args:
        planes: ``[batch, q_len, num_kv_heads, num_planes, num_words]``, int32, contiguous, of
            ``encode_query``.
        code_cache: ``[num_pages, num_kv_heads, page_size, num_words]``, int32.
        norm_cache: ``[num_pages, num_kv_heads, page_size]``, float16; or None.
        block_table: ``[batch, max_pages]``, int32.
        cache_seqlens: ``[batch]``, int32, the ``q_len`` query tokens included.
        weight_sum: ``plane_weight_sum(query_bits, group)`` of the planes, 1..255.
        top_k: Positions to select, at least 1; may exceed the sequence's length.
        num_sink: Positions at the start that are always selected.
        num_recent: Visible positions at the end that are always selected; ``num_sink + num_recent``
            is at most ``top_k``, or ``min_top_k`` where there is a share.
        top_k_share: A token selects this share of the positions that it sees, rounded up, but at
            least ``min_top_k`` and at most ``top_k``. Above 0 and below 1, and taken down to a
            multiple of 2 ** -32. None: every token selects ``top_k``.
        min_top_k: The least number with a share, ``1..top_k``; None is ``num_sink + num_recent``,
            and at least 1. Without a share it must be None.
        return_cut: Whether to say how each selection ended as well.

    Returns:
        ``indices`` ``[batch, q_len, num_kv_heads, min(top_k, max_pages * page_size)]``, int32:
        ascending, then -1; and ``num_selected`` ``[batch, q_len, num_kv_heads]``, int32.
        With ``return_cut`` also ``last_score``, int32, or float16 with norms, and ``num_ties``,
        int32, of the shape of ``num_selected``. Positions compete that are neither sinks nor
        recent: ``last_score`` is the lowest score of those that were selected, and ``num_ties``
        says how many of them all have it, selected or not. Where no competing position was
        selected, or every visible one was, they are the lowest score but NaN (-2 ** 31 or
        -infinity) and 0.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride, device or size is not as above; on CPU also a length
            or page out of range.
    """
    selected = torch.ops.hata.score_select.default(
        planes,
        code_cache,
        norm_cache,
        block_table,
        cache_seqlens,
        weight_sum,
        top_k,
        num_sink,
        num_recent,
        top_k_share,
        min_top_k,
        return_cut,
    )
    return selected if return_cut else selected[:2]


@torch.library.register_fake("hata::score_select")
def _(
    planes: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    weight_sum: int,
    top_k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    return_cut: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = planes.shape[:3]
    capacity = block_table.shape[1] * code_cache.shape[2]
    cut = (*rows[:2], rows[2] if return_cut else 0)
    score_dtype = torch.int32 if norm_cache is None else torch.float16
    return (
        planes.new_empty((*rows, min(top_k, capacity))),
        planes.new_empty(rows),
        planes.new_empty(cut, dtype=score_dtype),
        planes.new_empty(cut),
    )
