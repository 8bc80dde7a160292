"""Quest: an upper bound of the logits for every page of keys."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from hata.checks import check_int
from hata.selectors.selector import CACHE_ITEMSIZE, Queries, Score, Selector
from hata.selectors.softmax import Softmax


@dataclass(frozen=True)
class QuestSelector(Selector):
    """Whole pages, by what their keys' channel-wise minimum and maximum let a logit be at most.

    ``score[page] = sum over the group's heads g and channels c of
    max(q_gc min_c(page), q_gc max_c(page))``. As many whole pages as fit into the budget are
    selected, among them those with sinks and recent positions and the one that is not yet full.

    Source: Quest, arXiv 2406.10774, section 3.4 and algorithm 1. Quest selects for each query head;
    the sum over the group makes it share a selection, as all selectors here do. Reads
    ``4 head_dim / page_size`` bytes a token.

    Attributes:
        page_size: Keys of a page, at least 1.

    Raises:
        TypeError: ``page_size`` is no int.
        ValueError: ``page_size`` is out of range.
    """

    name: ClassVar[str] = "quest"
    page_size: int = 16

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_int("QuestSelector", "page_size", self.page_size, 1)

    @property
    def variant(self) -> str:
        """The page size."""
        return f"pages of {self.page_size}"

    @property
    def settings(self) -> dict[str, object]:
        """The page size."""
        return {"recipe": self.variant}

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Takes minimum and maximum of every page.

        A page that a query sees only in part has bounds of all its keys; its score does not count,
        since such a page is always selected.
        """
        missing = -k.shape[0] % self.page_size
        lows, highs = (
            pad(k.float(), (0, 0, 0, 0, 0, missing), value=end).unflatten(0, (-1, self.page_size))
            for end in (torch.inf, -torch.inf)
        )
        low, high = lows.amin(1), highs.amax(1)  # [num_pages, num_kv_heads, head_dim]

        def score(q: Tensor, positions: Tensor) -> Tensor:
            rising, falling = q.clamp(min=0).sum(2), q.clamp(max=0).sum(2)
            bound = torch.einsum("qhd,phd->qhp", rising, high)
            return bound + torch.einsum("qhd,phd->qhp", falling, low)

        return score

    def bytes_per_token(self, head_dim: int) -> float:
        """A page's two bounds, shared by its positions."""
        return 2 * CACHE_ITEMSIZE * head_dim / self.page_size
