"""How much attention mass hash weights lose on held-out queries, and how much must be lost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hata.selectors import HataSelector, prefixes, rank
from hata.selectors.quality import DenseAttention
from hata.training.data import TrainingData
from hata.weights import HashWeights

_LOGITS_AT_ONCE = 2**26  # of query tokens, heads and keys: bounds memory to about 2 GB


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


@torch.inference_mode()
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
        budgets: Values of ``top_k``, ascending.

    Returns:
        Means over all queries, float64, on the CPU.
    """
    layers_as_one = HashWeights(key_weights[None], query_weights[None], query_bits, key_norms)
    selector = HataSelector(layers_as_one)
    always = {"num_sink": data.num_sink, "num_recent": data.num_recent}
    sums = torch.zeros(3, data.heads, len(budgets), dtype=torch.float64, device=data.k.device)
    num_queries, group = data.q.shape[2:4]
    at_once = max(1, _LOGITS_AT_ONCE // (data.heads * group * data.seq_len))
    for sequence_idx in range(data.num_sequences):
        k = data.k[sequence_idx].transpose(0, 1)
        score = selector.index(0, k, data.softmax)
        for start in range(0, num_queries, at_once):
            rows = slice(start, start + at_once)
            q = data.q[sequence_idx, :, rows].transpose(0, 1)
            positions = data.positions[sequence_idx, rows]
            dense = DenseAttention(q, k, None, positions, data.softmax)
            exact = rank(dense.mass, positions, budgets[-1], **always)
            chosen = rank(score(q, positions), positions, budgets[-1], **always)
            ranks = dense.ranks(exact)
            bound = dense.quality(prefixes(exact, budgets), ranks, budgets)
            found = dense.quality(prefixes(chosen, budgets), ranks, budgets)
            sums += torch.stack([found.attention_mass, bound.attention_mass, found.recall])
    mass, bound_mass, recall = (sums / (data.num_sequences * num_queries)).cpu()
    return Selected(1 - mass, 1 - bound_mass, recall)
