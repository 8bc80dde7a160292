"""StreamingLLM: sinks and recent positions, whatever the query."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.selectors.selector import Queries, Score, Selector
from hata.selectors.softmax import Softmax


@dataclass(frozen=True)
class StreamingSelector(Selector):
    """The first positions and the last ones: ``score[t] = 0``, so that the most recent follow.

    Source: StreamingLLM, arXiv 2309.17453, section 3.2. It numbers the positions inside its cache
    anew; here keys keep the positions that they were rotated by, as for every other selector. Reads
    nothing to choose.
    """

    name: ClassVar[str] = "streaming"

    @property
    def variant(self) -> str:
        """What is selected."""
        return "sinks and recent"

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Keeps the number of keys."""
        seq_len, num_kv_heads = k.shape[:2]

        def score(q: Tensor, positions: Tensor) -> Tensor:
            return torch.zeros(q.shape[0], num_kv_heads, seq_len, device=q.device)

        return score

    def bytes_per_token(self, head_dim: int) -> float:
        """Nothing."""
        return 0.0
