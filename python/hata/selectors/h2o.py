"""H2O: the positions that all earlier queries together attended to most, and the last ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.selectors.ranking import Selection, rank
from hata.selectors.selector import Queries, Score, Selector
from hata.selectors.softmax import Softmax


@dataclass(frozen=True)
class H2oSelector(Selector):
    """Heavy hitters, and as many recent positions.

    ``score[t] = sum over all queries j before the token of (mean over the group's heads g of
    softmax_t(softmax_scale q_jg . k_t))``; half of the budget goes to the last positions.

    Source: H2O, arXiv 2306.14048, section 4. It drops a key as soon as the budget is full and adds
    up the attention among those that are left; here the prompt is dense, what is added up is dense
    attention, and nothing is dropped for good, so that the choice is better than its own. ``hata
    recall`` adds up the captured queries, a sample of all. Reads nothing to choose.
    """

    name: ClassVar[str] = "h2o"
    observes: ClassVar[bool] = True

    @property
    def variant(self) -> str:
        """What is selected."""
        return "half heavy hitters"

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Keeps keys and queries."""
        observed = Queries.needed_by("H2oSelector", queries)

        def score(q: Tensor, positions: Tensor) -> Tensor:
            stop = observed.before(positions)
            return observed.attention(torch.zeros_like(stop), stop, k, softmax)

        return score

    def select(
        self,
        layer_idx: int,
        scores: Tensor,
        positions: Tensor,
        budgets: Sequence[int],
        *,
        num_sink: int,
        num_recent: int,
    ) -> list[Selection]:
        """Takes the last positions for half of each budget."""
        selections = []
        for budget in budgets:
            recent = max(num_recent, min(budget // 2, budget - num_sink))
            order = rank(scores, positions, budget, num_sink=num_sink, num_recent=recent)
            selections.append(Selection(order))
        return selections

    def bytes_per_token(self, head_dim: int) -> float:
        """Nothing: what is kept is known before the token."""
        return 0.0
