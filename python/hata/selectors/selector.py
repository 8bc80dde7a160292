"""What every selector is: keys are indexed once, then every query scores all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hata.selectors.softmax import Softmax

# q [num_queries, num_kv_heads, group, head_dim], float32, and positions [num_queries], int64, to
# scores [num_queries, num_kv_heads, num_pages], float32: larger is better, and what a query does
# not see holds anything.
Score = Callable[[Tensor, Tensor], Tensor]

CACHE_ITEMSIZE = 2  # bytes of a cached number in `Selector.bytes_per_token`: a 16-bit cache


class Selector(ABC):
    """Chooses, for each query token and KV head, the positions that are worth attending to.

    All selectors choose by KV head, one set for the group of query heads that share it, and all of
    them are ranked by `hata.selectors.rank`, which treats sinks and recent positions alike. Plain
    PyTorch on any device: selectors are compared for what they find, not for their speed.

    Attributes:
        name: One word.
        page_size: Positions that are selected together; 1 selects single positions.
    """

    name: ClassVar[str]
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
    def index(self, layer_idx: int, k: Tensor, softmax: Softmax) -> Score:
        """Computes what is kept beside one sequence's keys of one layer.

        Args:
            layer_idx: The layer.
            k: ``[seq_len, num_kv_heads, head_dim]``, after the rotary embedding.
            softmax: The layer's, which tells a selector that estimates shares of attention.

        Returns:
            The function that scores the keys for given queries.
        """

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
