"""The order in which positions are selected, the same for every selector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PAGE_BITS = 29
_ALWAYS = 2 ** (32 + _PAGE_BITS)


@dataclass(frozen=True)
class Selection:
    """The positions that some queries attend to.

    Attributes:
        indices: ``[num_queries, num_kv_heads, count]``, int64, each position once; -1 for none.
        weights: The same shape, float32: for how many positions each stands, as a factor of its
            ``exp(logit)``; None is 1 for all.
    """

    indices: Tensor
    weights: Tensor | None = None


def prefixes(order: Tensor, budgets: Sequence[int], page_size: int = 1) -> list[Selection]:
    """Cuts an order into the selections of some budgets, whole pages each.

    Args:
        order: ``[num_queries, num_kv_heads, count]``, as `rank` gives it for the largest budget.
        budgets: Numbers of positions.
        page_size: Positions that are selected together.
    """
    return [Selection(order[..., : budget // page_size * page_size]) for budget in budgets]


def rank(
    scores: Tensor,
    positions: Tensor,
    count: int,
    *,
    num_sink: int,
    num_recent: int,
    page_size: int = 1,
) -> Tensor:
    """Orders positions as they are selected; a budget of n takes the first n.

    Pages that hold one of the first ``num_sink`` or the last ``num_recent`` visible positions, or
    that are not yet full, come first; they count inside the budget. The others follow by score, and
    the most recent first where scores are equal. With ``page_size`` 1 this is the rule of
    `hata.select_topk`. Deterministic: no two keys of the sort are equal.

    Args:
        scores: ``[num_queries, num_kv_heads, num_pages]``, float32, no NaN.
        positions: ``[num_queries]``, int64: query i sees ``0..positions[i]``.
        count: How many positions to order at most.
        num_sink: First positions that are always selected.
        num_recent: Last positions that are always selected.
        page_size: Positions of a page; ``page * page_size`` is its first.

    Returns:
        ``[num_queries, num_kv_heads, min(count // page_size, num_pages) * page_size]``, int64; -1
        for positions that the query does not see.
    """
    num_pages = scores.shape[-1]
    first = torch.arange(num_pages, device=scores.device) * page_size
    last_seen = positions[:, None]
    always = (first < num_sink) | (first + page_size > last_seen + 1 - num_recent)
    # A float's bits, all but the sign flipped for negative ones, are ordered as an int is.
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0 equals 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + 2**31
    keys = (ordered << _PAGE_BITS) + first // page_size
    keys = keys + torch.where(always, _ALWAYS, 0)[:, None]
    keys = keys.masked_fill((first > last_seen)[:, None], -1)
    best = keys.topk(min(count // page_size, num_pages)).values
    pages = (best & (2**_PAGE_BITS - 1))[..., None] * page_size
    chosen = pages + torch.arange(page_size, device=scores.device)
    seen = (best[..., None] >= 0) & (chosen <= last_seen[:, None, None])
    return torch.where(seen, chosen, -1).flatten(-2)
