"""The bound: the positions that hold the most attention."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hata.selectors.selector import CACHE_ITEMSIZE, Queries, Score, Selector, products
from hata.selectors.softmax import Softmax


@dataclass(frozen=True)
class ExactSelector(Selector):
    """Exact top-k of the group's attention: no selector can hold more of its mass.

    ``score[t] = mean over the group's heads g of softmax_t(softmax_scale q_g . k_t)``, or, with
    ``sum_logits``, ``(sum_g q_g) . k_t``: the bound for any score that is linear in the query.

    Source: HATA, arXiv 2506.02572, section 5 (exact top-k). Reads every key: ``2 head_dim`` bytes a
    token.

    Attributes:
        sum_logits: Whether to rank by the group's summed logits.
    """

    name: ClassVar[str] = "exact"
    sum_logits: bool = False

    @property
    def variant(self) -> str:
        """Whether softmax or logits are summed over the group."""
        return "logits" if self.sum_logits else "softmax"

    @property
    def settings(self) -> dict[str, object]:
        """What is summed."""
        return {"recipe": self.variant}

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Keeps the keys."""

        def score(q: Tensor, positions: Tensor) -> Tensor:
            if self.sum_logits:
                return products(q.sum(2, keepdim=True), k)[:, :, 0]
            return softmax.shares(products(q, k), positions).mean(2)

        return score

    def bytes_per_token(self, head_dim: int) -> float:
        """The key's bytes."""
        return CACHE_ITEMSIZE * head_dim
