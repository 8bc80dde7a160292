"""How well selections of growing size stand in for dense attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hata.selectors.ranking import Selection
from hata.selectors.selector import products
from hata.selectors.softmax import Softmax

_NOT_RANKED = 2**31 - 1


@dataclass(frozen=True)
class Quality:
    """Three figures of merit, each ``[num_kv_heads, num_budgets]``, float64.

    Attributes:
        recall: Share of the exact top-k set that is selected.
        attention_mass: Share of the dense softmax that the selected positions hold, and a sink with
            them: what is lost are the shares of the other positions.
        output_error: ``|out - dense| / |dense|``, Euclidean, of the attention output over the
            selected positions; None without values.
    """

    recall: Tensor
    attention_mass: Tensor
    output_error: Tensor | None

    def __add__(self, other: "Quality") -> "Quality":
        """Adds the sums over other query tokens."""
        errors = None
        if self.output_error is not None and other.output_error is not None:
            errors = self.output_error + other.output_error
        mass = self.attention_mass + other.attention_mass
        return Quality(self.recall + other.recall, mass, errors)

    def mean(self, num_tokens: int) -> "Quality":
        """Turns sums over query tokens into means, on the CPU."""
        errors = None if self.output_error is None else (self.output_error / num_tokens).cpu()
        mass = self.attention_mass / num_tokens
        return Quality((self.recall / num_tokens).cpu(), mass.cpu(), errors)


class DenseAttention:
    """Dense attention of some query tokens: what selections are compared with.

    Args:
        q: ``[num_queries, num_kv_heads, group, head_dim]``, float32.
        k: ``[seq_len, num_kv_heads, head_dim]``.
        v: The same shape, or None.
        positions: ``[num_queries]``, int64: query i sees ``0..positions[i]``.
        softmax: The layer's.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor | None, positions: Tensor, softmax: Softmax
    ) -> None:
        self._seq_len, self._num_seen = k.shape[0], positions[:, None] + 1
        self._heads = torch.arange(k.shape[1], device=k.device)[:, None]
        self._shares = softmax.shares(products(q, k), positions)
        self._sinks = self._shares.new_zeros(self._shares.shape[:3])  # what a head's sink takes
        if softmax.sink_logits is not None:
            self._sinks = (1 - self._shares.sum(-1)).clamp_(min=0)
        self._values = None if v is None else v.float().transpose(0, 1)  # [kv_heads, seq_len, dim]
        if self._values is not None:
            self._out = torch.einsum("qhgs,hsd->qhgd", self._shares, self._values)

    @property
    def mass(self) -> Tensor:
        """The attention of each position: ``[num_queries, num_kv_heads, seq_len]``.

        Mean over the heads of a group; the exact top-k is the order of these.
        """
        return self._shares.mean(2)

    def ranks(self, order: Tensor) -> Tensor:
        """Turns an order into each position's rank in it.

        Args:
            order: ``[num_queries, num_kv_heads, count]``, as `hata.selectors.rank` gives it.

        Returns:
            ``[num_queries, num_kv_heads, seq_len + 1]``, int32: behind all others where a position
            has no rank; the last column stands for -1.
        """
        shape = (*order.shape[:2], self._seq_len + 1)
        unranked = torch.full(shape, _NOT_RANKED, dtype=torch.int32, device=order.device)
        found = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device)
        ranks = unranked.scatter(2, order.where(order >= 0, self._seq_len), found.expand_as(order))
        ranks[..., self._seq_len] = _NOT_RANKED
        return ranks

    def attention_mass(self, indices: Tensor) -> Tensor:
        """Returns what `quality` calls so of one selection, ``[num_kv_heads]``: sums over tokens.

        Args:
            indices: ``[num_queries, num_kv_heads, count]``, int64; -1 is no position.
        """
        return self._mass(self._selected_shares(indices))

    def _selected_shares(self, indices: Tensor) -> Tensor:
        """The shares of selected positions, ``[num_queries, num_kv_heads, group, count]``."""
        group = self._shares.shape[2]
        rows = indices.clamp(min=0)[:, :, None].expand(-1, -1, group, -1)
        return self._shares.gather(3, rows) * (indices >= 0)[:, :, None]

    def _mass(self, shares: Tensor) -> Tensor:
        """What they are together; a sink is in the denominator of sparse attention too."""
        return (self._sinks + shares.sum(-1)).double().mean(2).sum(0)

    def quality(
        self, selections: Sequence[Selection], exact_ranks: Tensor, budgets: Sequence[int]
    ) -> Quality:
        """Compares the selections of several budgets.

        Args:
            selections: One for each budget, as `hata.selectors.Selector.select` gives them.
            exact_ranks: `ranks` of the exact selector's order.
            budgets: Numbers of positions.

        Returns:
            Sums over the query tokens of means over a group's heads.
        """
        recalls, masses, errors = [], [], []
        for selection, budget in zip(selections, budgets, strict=True):
            indices = selection.indices
            hit_ranks = exact_ranks.gather(2, indices.where(indices >= 0, self._seq_len))
            hits = (hit_ranks < budget).sum(-1)
            recalls.append((hits.double() / self._num_seen.clamp(max=budget)).sum(0))
            shares = self._selected_shares(indices)
            masses.append(self._mass(shares))
            if self._values is not None:
                if selection.weights is not None:
                    shares = shares * selection.weights[:, :, None]
                values = self._values[self._heads, indices.clamp(min=0)]
                out = torch.einsum("qhgk,qhkd->qhgd", shares, values)
                whole = (self._sinks + shares.sum(-1)).clamp(min=1e-30)
                difference = out / whole[..., None] - self._out
                error = difference.norm(dim=-1) / self._out.norm(dim=-1)
                errors.append(error.double().mean(2).sum(0))
        error_sums = torch.stack(errors, -1) if errors else None
        return Quality(torch.stack(recalls, -1), torch.stack(masses, -1), error_sums)
