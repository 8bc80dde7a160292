"""What every selector is: keys are indexed once, then every query scores all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.checks import check
from hata.selectors.ranking import Selection, prefixes, rank
from hata.selectors.softmax import Softmax

# q [num_queries, num_kv_heads, group, head_dim], float32, and positions [num_queries], int64, to
# scores [num_queries, num_kv_heads, num_pages], float32: larger is better, and what a query does
# not see holds anything.
Score = Callable[[Tensor, Tensor], Tensor]

CACHE_ITEMSIZE = 2  # bytes of a cached number in `Selector.bytes_per_token`: a 16-bit cache
_SHARES_AT_ONCE = 2**24  # of all heads: about 0.3 GB while they are made


@dataclass(frozen=True)
class Queries:
    """Queries of one sequence and layer, for selectors that go by what earlier ones attend to.

    Attributes:
        q: ``[num_queries, num_kv_heads, group, head_dim]``, after the rotary embedding.
        positions: ``[num_queries]``, int64, ascending: query i sees ``0..positions[i]``.
    """

    q: Tensor
    positions: Tensor

    @staticmethod
    def needed_by(selector: str, queries: "Queries | None") -> "Queries":
        """Returns the queries that a selector was given.

        Raises:
            ValueError: It was given none.
        """
        check(queries is not None, selector, "queries", "be given", None)
        assert queries is not None  # what check has made sure of, for mypy
        return queries

    def before(self, positions: Tensor) -> Tensor:
        """Counts the queries before each of these positions: ``[num_positions]``, int64."""
        return torch.searchsorted(self.positions, positions)

    def attention(self, first: Tensor, stop: Tensor, k: Tensor, softmax: Softmax) -> Tensor:
        """Sums the attention that ranges of the queries pay each position.

        Args:
            first: ``[num_ranges]``, int64: the first query of each range.
            stop: ``[num_ranges]``: the one after its last.
            k: ``[seq_len, num_kv_heads, head_dim]``.
            softmax: The layer's.

        Returns:
            ``[num_ranges, num_kv_heads, seq_len]``, float32, mean over the heads of a group.
        """
        total = torch.zeros(len(first), *k.shape[1::-1], device=k.device)
        rows = torch.arange(len(self.q), device=k.device)
        rows = rows[int(first.min()) : int(stop.max())]
        num_heads = self.q.shape[1] * self.q.shape[2]
        for some in rows.split(max(1, _SHARES_AT_ONCE // (num_heads * k.shape[0]))):
            shares = softmax.shares(products(self.q[some], k), self.positions[some]).mean(2)
            inside = (first[:, None] <= some) & (some < stop[:, None])
            total += torch.einsum("ru,uhs->rhs", inside.float(), shares)
        return total


class Selector(ABC):
    """Chooses, for each query token and KV head, the positions that are worth attending to.

    All selectors choose by KV head, one set for the group of query heads that share it, and all of
    them select sinks and recent positions too, inside the budget. Plain
    PyTorch on any device: selectors are compared for what they find, not for their speed.

    Attributes:
        name: One word.
        page_size: Positions that are selected together; 1 selects single positions.
        observes: Whether it goes by what earlier queries attend to.
        foresees: Whether it scores with queries that are foreseen from the layer before.
    """

    name: ClassVar[str]
    observes: ClassVar[bool] = False
    foresees: ClassVar[bool] = False
    page_size: int = 1

    @property
    @abstractmethod
    def variant(self) -> str:
        """Tells selectors of one name apart, in a few words."""

    @property
    def settings(self) -> dict[str, object]:
        """What a table says of it: recipe, num_bits, query_bits, key_norms, channels, or none."""
        return {}

    @abstractmethod
    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Computes what is kept beside one sequence's keys of one layer.

        Args:
            layer_idx: The layer.
            k: ``[seq_len, num_kv_heads, head_dim]``, after the rotary embedding.
            softmax: The layer's, which tells a selector that estimates shares of attention.
            queries: Those of the sequence that are known, which a selector that `observes` needs;
                a score uses those before its own position alone.

        Returns:
            The function that scores the keys for given queries.
        """

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
        """Chooses positions by their scores: here the first of `hata.selectors.rank`.

        Args:
            layer_idx: The layer.
            scores: What the function of `index` gave.
            positions: ``[num_queries]``, int64: query i sees ``0..positions[i]``.
            budgets: Numbers of positions, ascending.
            num_sink: First positions that are always selected.
            num_recent: Last positions that are always selected.

        Returns:
            A selection for each budget.
        """
        always = {"num_sink": num_sink, "num_recent": num_recent}
        order = rank(scores, positions, budgets[-1], page_size=self.page_size, **always)
        return prefixes(order, budgets, self.page_size)

    @abstractmethod
    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes that choosing reads for each cached position and KV head.

        What is then read of the chosen positions is the same for every selector and not counted.

        Args:
            head_dim: Channels of a head.
        """


def products(q: Tensor, k: Tensor) -> Tensor:
    """Products of queries and keys in float32.

    Args:
        q: ``[num_queries, num_kv_heads, group, channels]``.
        k: ``[seq_len, num_kv_heads, channels]``.

    Returns:
        ``[num_queries, num_kv_heads, group, seq_len]``.
    """
    return torch.einsum("qhgd,shd->qhgs", q.float(), k.float())
