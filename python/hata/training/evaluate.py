"""How much attention mass hash weights lose on held-out queries, and how much must be lost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hata.ops import select_topk
from hata.reference import MAX_NORM, scale_by_norm
from hata.training.codes import query_vector, sign
from hata.training.data import TrainingData

_ROWS = 64  # query tokens at once, which bounds memory


@dataclass(frozen=True)
class Selected:
    """What selecting by hash score catches, mean over queries, for each KV head and budget.

    Attributes:
        lost: Share of the dense attention mass outside the selected positions,
            ``[heads, num_budgets]``.
        lost_exact: The same for the exact top-k of the group's mean attention.
        recall: Share of that exact top-k which was selected.
    """

    lost: Tensor
    lost_exact: Tensor
    recall: Tensor


def evaluate(
    data: TrainingData,
    key_weights: Tensor,
    query_weights: Tensor,
    *,
    query_bits: int,
    key_norms: bool,
    budgets: Sequence[int],
) -> Selected:
    """Selects with hash weights as decoding does, and weighs what was selected.

    Args:
        data: Held-out queries and keys.
        key_weights: ``[heads, head_dim, num_bits]``.
        query_weights: The same.
        query_bits: Bits of a query's projection.
        key_norms: Whether scores are scaled by the key's norm.
        budgets: Values of ``top_k``.

    Returns:
        Means over all queries, on the CPU.
    """
    sums = torch.zeros(3, data.heads, len(budgets), dtype=torch.float64)
    num_queries = data.positions.shape[1]
    for sequence_idx in range(data.num_sequences):
        k = data.k[sequence_idx]
        signs = sign(torch.bmm(k, key_weights))
        norms = k.norm(dim=-1).clamp(max=MAX_NORM).half()[:, None] if key_norms else None
        for start in range(0, num_queries, _ROWS):
            rows = slice(start, min(start + _ROWS, num_queries))
            c = query_vector(data.q[sequence_idx, :, rows], query_weights, query_bits)
            scores = torch.bmm(c, signs.transpose(1, 2))
            if norms is not None:
                scores = scale_by_norm(scores, signs.shape[-1], norms)
            mass = data.attention(sequence_idx, rows)
            seqlens = (data.positions[sequence_idx, rows] + 1).int()
            for i, top_k in enumerate(budgets):
                chosen = _select(scores, seqlens, top_k, data)
                exact = _select(mass, seqlens, top_k, data)
                sums[0, :, i] += (1 - _inside(mass, chosen).sum(-1)).sum(-1).cpu()
                sums[1, :, i] += (1 - _inside(mass, exact).sum(-1)).sum(-1).cpu()
                wanted = torch.zeros_like(mass).scatter_(-1, exact.clamp(min=0), 1.0)
                share = _inside(wanted, chosen).sum(-1) / (exact >= 0).sum(-1)
                sums[2, :, i] += share.sum(-1).cpu()
    lost, lost_exact, recall = sums / (data.num_sequences * num_queries)
    return Selected(lost, lost_exact, recall)


def _select(scores: Tensor, seqlens: Tensor, top_k: int, data: TrainingData) -> Tensor:
    """Returns ``[heads, num_rows, top_k]`` positions; every query token is its own sequence."""
    scores = scores.transpose(0, 1)[:, None]
    indices, _ = select_topk(
        scores, seqlens, top_k, num_sink=data.num_sink, num_recent=data.num_recent
    )
    return indices[:, 0].transpose(0, 1).long()


def _inside(values: Tensor, indices: Tensor) -> Tensor:
    return values.gather(-1, indices.clamp(min=0)) * (indices >= 0)
