"""SnapKV: what the last queries before a token attend to, and what lies beside it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from hata.checks import check, check_int
from hata.selectors.selector import Queries, Score, Selector
from hata.selectors.softmax import Softmax


@dataclass(frozen=True)
class SnapkvSelector(Selector):
    """The positions that the last ``window`` queries attended to most, in clusters.

    ``score[t] = max over |u - t| <= num_neighbors // 2 of sum over the last window queries j
    before the token of (mean over the group's heads g of softmax_u(softmax_scale q_jg . k_u))``;
    the last ``window`` positions themselves come first.

    Source: SnapKV, arXiv 2404.14469: an observation window of 32 queries votes, and votes are
    pooled over neighbours. It votes once, at the end of the prompt, drops the other keys of the
    prompt for good and keeps all that the answer adds. Here the window moves on with each token,
    nothing is dropped, and the answer's positions count inside the budget like all others: the
    first token after the prompt attends to what SnapKV keeps, the next ones to better choices than
    its own. ``hata recall`` has captured some queries of a sequence alone, so that a window reaches
    further back. Reads nothing to choose.

    Attributes:
        window: Queries that vote, at least 1.
        num_neighbors: Positions that share the largest of their votes, odd.

    Raises:
        TypeError: A number is no int.
        ValueError: One is out of range.
    """

    name: ClassVar[str] = "snapkv"
    observes: ClassVar[bool] = True
    window: int = 32
    num_neighbors: int = 7

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_int("SnapkvSelector", "window", self.window, 1)
        check_int("SnapkvSelector", "num_neighbors", self.num_neighbors, 1)
        odd = self.num_neighbors % 2 == 1
        check(odd, "SnapkvSelector", "num_neighbors", "be odd", self.num_neighbors)

    @property
    def variant(self) -> str:
        """Window and clusters."""
        return f"window of {self.window}, clusters of {self.num_neighbors}"

    @property
    def settings(self) -> dict[str, object]:
        """Window and clusters."""
        return {"recipe": self.variant}

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Keeps keys and queries."""
        observed = Queries.needed_by("SnapkvSelector", queries)
        places = torch.arange(k.shape[0], device=k.device)

        def score(q: Tensor, positions: Tensor) -> Tensor:
            stop = observed.before(positions)
            votes = observed.attention((stop - self.window).clamp(min=0), stop, k, softmax)
            pooled = max_pool1d(votes, self.num_neighbors, 1, self.num_neighbors // 2)
            inside = places > positions[:, None] - self.window
            return pooled.masked_fill(inside[:, None], torch.inf)

        return score

    def bytes_per_token(self, head_dim: int) -> float:
        """Nothing: what is kept is known before the token."""
        return 0.0
