"""score_select: planes and the code cache to the best positions."""

import torch
from torch import Tensor

from hata.ops.workspace_size import workspace_size


def score_select(
    planes: Tensor,
    code_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    top_k: int,
    *,
    weight_sum: int,
    num_sink: int = 0,
    num_recent: int = 0,
    norm_cache: Tensor | None = None,
    workspace: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores the code cache and selects the best positions in one operator.

    Equals ``select_topk(hamming_score(planes, ...), cache_seqlens, top_k, ...)`` bit for bit (HATA,
    arXiv 2506.02572, algorithm 3), without the public score tensor.

    Args:
        planes: ``[batch, q_len, num_kv_heads, num_planes, num_words]``, int32, contiguous, of
            ``encode_query``.
        code_cache: ``[num_pages, num_kv_heads, page_size, num_words]``, int32.
        block_table: ``[batch, max_pages]``, int32.
        cache_seqlens: ``[batch]``, int32, the ``q_len`` query tokens included.
        top_k: Positions to select, at least 1; may exceed the sequence's length.
        weight_sum: ``plane_weight_sum(query_bits, group)`` of the planes, 1..255.
        num_sink: Positions at the start that are always selected.
        num_recent: Visible positions at the end that are always selected;
            ``num_sink + num_recent <= top_k``.
        norm_cache: ``[num_pages, num_kv_heads, page_size]``, float16.
        workspace: uint8, 1-D, contiguous, at least ``workspace_size(batch, q_len, num_heads,
            num_kv_heads, head_dim, max_pages * page_size, top_k)`` bytes; used with ``out``, and
            allocated where it is missing.
        out: ``(indices, num_selected)`` to write into; contiguous.

    Returns:
        ``indices`` ``[batch, q_len, num_kv_heads, top_k]``, int32: ascending, then -1; and
        ``num_selected`` ``[batch, q_len, num_kv_heads]``, int32.

    Raises:
        RuntimeError: A shape, dtype, stride, device or size is not as above; on CPU also a length
            or page out of range.
        ValueError: ``workspace`` comes without ``out``.
    """
    if out is None:
        if workspace is not None:
            raise ValueError("hata.score_select: workspace must come with out, got out=None")
        return torch.ops.hata.score_select.default(
            planes,
            code_cache,
            norm_cache,
            block_table,
            cache_seqlens,
            weight_sum,
            top_k,
            num_sink,
            num_recent,
        )
    if workspace is None:
        batch, q_len, num_kv_heads = planes.shape[:3]
        capacity = block_table.shape[1] * code_cache.shape[2]
        size = workspace_size(batch, q_len, num_kv_heads, num_kv_heads, 0, capacity, top_k)
        workspace = planes.new_empty((size,), dtype=torch.uint8)
    indices, num_selected = out
    torch.ops.hata.score_select.out(
        planes,
        code_cache,
        norm_cache,
        block_table,
        cache_seqlens,
        weight_sum,
        top_k,
        num_sink,
        num_recent,
        workspace=workspace,
        indices=indices,
        num_selected=num_selected,
    )
    return out


@torch.library.register_fake("hata::score_select")
def _(
    planes: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    weight_sum: int,
    top_k: int,
    num_sink: int,
    num_recent: int,
) -> tuple[Tensor, Tensor]:
    batch, q_len, num_kv_heads, _, _ = planes.shape
    return (
        planes.new_empty((batch, q_len, num_kv_heads, top_k)),
        planes.new_empty((batch, q_len, num_kv_heads)),
    )


@torch.library.register_fake("hata::score_select.out")
def _(
    planes: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    weight_sum: int,
    top_k: int,
    num_sink: int,
    num_recent: int,
    *,
    workspace: Tensor,
    indices: Tensor,
    num_selected: Tensor,
) -> None:
    return None
