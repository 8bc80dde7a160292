"""fetch_rows: selected rows of a cache that is slow to read, by a cache of rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from hata.ops.inference import inference_only


class FetchedRows(NamedTuple):
    """Where the rows of a selection are.

    Attributes:
        slots: ``[batch, 1, num_kv_heads, top_k]``, int32: which row of ``k_rows`` and ``v_rows``
            each index has become; -1 where it names no row. `gather_attention` takes them as
            ``indices``.
        missing: The same shape, int32: which of a list's indices were not cached, ascending, then
            -1.
        num_missing: How many they are, ``[batch, num_kv_heads]``, int32.
    """

    slots: Tensor
    missing: Tensor
    num_missing: Tensor


@inference_only
def fetch_rows(
    indices: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    slot_of_row: Tensor,
    position_of_slot: Tensor,
    referenced: Tensor,
    hand: Tensor,
    *,
    slots: Tensor | None = None,
    missing: Tensor | None = None,
    num_missing: Tensor | None = None,
) -> FetchedRows:
    """Brings the rows of selected positions into a row cache, and says in which slot each is.

    For caches in memory that is slow to read, such as host memory: what one step selects,
    the next mostly selects again. Each sequence and KV head has ``num_slots`` rows. One that is
    cached stays where it is. Each other one, in the order of ``indices``, is copied into the slot
    that a clock gives up (Corbato, A paging experiment with the Multics system, 1968): a hand goes
    round the slots, passes those that this call uses, passes those that have been used since it
    last came by and clears their mark, and gives up the first other one. The same calls give the
    same slots on every device.

    Whoever changes what a position of a sequence holds sets the ``position_of_slot`` entries that
    name it to -1.

    Args:
        indices: ``[batch, 1, num_kv_heads, top_k]``, int32, contiguous, of one query token; each
            position at most once. One below 0 or not below the sequence's length names no row.
        k_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, float16, bfloat16 or
            float8_e4m3fn (float32 too on CPU).
        v_cache: The same.
        block_table: ``[batch, max_pages]``, int32.
        cache_seqlens: ``[batch]``, int32.
        k_rows: ``[batch, num_slots, num_kv_heads, head_dim]``, dtype of the caches; num_slots is at
            least top_k and at most 2^20. Written.
        v_rows: The same. Written.
        slot_of_row: ``[num_pages, num_kv_heads, page_size]``, int32, contiguous: where a row may
            be; anything at first, such as 0. Written.
        position_of_slot: ``[batch, num_kv_heads, num_slots]``, int32, contiguous: whose row a slot
            holds; -1 where none, as at first. Written.
        referenced: The same shape, uint8: 1 where a slot was used since the hand last passed; 0 at
            first. Written.
        hand: ``[batch, num_kv_heads]``, int32, contiguous: the slot to look at next; 0 at first.
            Written.
        slots: Where to write the output of that name, contiguous; allocated where missing.
        missing: The same.
        num_missing: The same.

    Returns:
        The outputs; buffers that were given are returned as they are.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride, device or size is not as above; on CPU also a length
            or page out of range.
    """
    slots = torch.empty_like(indices) if slots is None else slots
    missing = torch.empty_like(indices) if missing is None else missing
    if num_missing is None:
        num_missing = torch.empty_like(hand)
    torch.ops.hata.fetch_rows.default(
        indices,
        k_cache,
        v_cache,
        block_table,
        cache_seqlens,
        k_rows,
        v_rows,
        slot_of_row,
        position_of_slot,
        referenced,
        hand,
        slots=slots,
        missing=missing,
        num_missing=num_missing,
    )
    return FetchedRows(slots, missing, num_missing)


@torch.library.register_fake("hata::fetch_rows")
def _(
    indices: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    slot_of_row: Tensor,
    position_of_slot: Tensor,
    referenced: Tensor,
    hand: Tensor,
    *,
    slots: Tensor,
    missing: Tensor,
    num_missing: Tensor,
) -> None:
    return None
