"""select_topk: the best positions of a row of scores."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def select_topk(
    scores: Tensor,
    cache_seqlens: Tensor,
    *,
    top_k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    return_cut: bool = False,
) -> tuple[Tensor, ...]:
    """Selects the ``top_k`` visible positions with the highest scores, exactly.

    The first ``num_sink`` and the last ``num_recent`` visible positions are always selected and
    count inside ``top_k``; the others are those with the highest scores, and equal scores at the
    cut go to the most recent positions. The result is the same for every batch, launch and device.
    (The selection step of HATA, arXiv 2506.02572, algorithm 3, with its ties made definite.)

    Args:
        scores: ``[batch, q_len, num_kv_heads, max_seq_len]``, int32, float16 or float32; any
            strides, last dimension contiguous. NaN is below everything, -0 equals +0.
        cache_seqlens: ``[batch]``, int32, the ``q_len`` query tokens included.
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
        ``indices`` ``[batch, q_len, num_kv_heads, min(top_k, max_seq_len)]``, int32: ascending,
        then -1; and ``num_selected`` ``[batch, q_len, num_kv_heads]``, int32: the smaller of
        the budget and the number of visible positions.
        With ``return_cut`` also ``last_score``, the dtype of ``scores``, and ``num_ties``,
        int32, of the shape of ``num_selected``. Positions compete that are neither sinks nor
        recent: ``last_score`` is the lowest score of those that were selected, and ``num_ties``
        says how many of them all have it, selected or not. Where no competing position was
        selected, or every visible one was, they are the lowest score but NaN (-2 ** 31 or
        -infinity) and 0.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride, device or size is not as above; on CPU also a length
            that is negative or above ``max_seq_len``.
    """
    selected = torch.ops.hata.select_topk.default(
        scores, cache_seqlens, top_k, num_sink, num_recent, top_k_share, min_top_k, return_cut
    )
    return selected if return_cut else selected[:2]


@torch.library.register_fake("hata::select_topk")
def _(
    scores: Tensor,
    cache_seqlens: Tensor,
    top_k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    return_cut: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rows, max_seq_len = scores.shape
    cut = (*rows[:-1], rows[-1] if return_cut else 0)
    return (
        scores.new_empty((*rows, min(top_k, max_seq_len)), dtype=torch.int32),
        scores.new_empty(rows, dtype=torch.int32),
        scores.new_empty(cut),
        scores.new_empty(cut, dtype=torch.int32),
    )
