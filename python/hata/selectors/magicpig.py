"""MagicPIG: the keys that fall into a query's buckets of locality-sensitive hash tables."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.checks import check_int
from hata.selectors.selector import Queries, Score, Selector
from hata.selectors.softmax import Softmax


@dataclass(frozen=True)
class MagicpigSelector(Selector):
    """How often a key falls into the query's bucket, over some hash tables.

    ``score[t] = sum over the group's heads g and tables l of
    [all num_table_bits signs of (k_t - m) P_l equal those of q_g P_l]``, m the mean key and P_l
    Gaussian.

    Source: MagicPIG, arXiv 2410.16179, its tables and its centred keys. It attends to the keys with
    two collisions or more, however many they are, and weights each by how likely that was; here
    the budget is given and the most frequent are attended to plainly, as for every selector. Its
    tables lie on the CPU, and a query reads the entries of its buckets; what is counted here are
    the codes of a scan, ``num_tables num_table_bits / 8`` bytes a token.

    Attributes:
        num_tables: Hash tables, at least 1.
        num_table_bits: Bits of a bucket's number, 1 to 24.
        seed: Draws the projections.

    Raises:
        TypeError: A number is no int.
        ValueError: One is out of range.
    """

    name: ClassVar[str] = "magicpig"
    num_tables: int = 150
    num_table_bits: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_int("MagicpigSelector", "num_tables", self.num_tables, 1)
        check_int("MagicpigSelector", "num_table_bits", self.num_table_bits, 1, 24)

    @property
    def variant(self) -> str:
        """Tables and their bits."""
        return f"{self.num_tables} tables of {self.num_table_bits} bits"

    @property
    def settings(self) -> dict[str, object]:
        """Tables and bits, by name."""
        return {"recipe": self.variant, "num_bits": self.num_tables * self.num_table_bits}

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Hashes the centred keys."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (k.shape[-1], self.num_tables, self.num_table_bits)
        projection = torch.randn(shape, generator=generator).to(k.device)
        places = (2 ** torch.arange(self.num_table_bits, device=k.device)).float()

        def buckets(x: Tensor) -> Tensor:  # float32 counts up to 2**24 exactly
            signs = torch.einsum("...d,dlb->...lb", x, projection) > 0
            return (signs.float() @ places).int()

        keys = buckets(k.float() - k.float().mean(0)).permute(1, 2, 0).contiguous()

        def score(q: Tensor, positions: Tensor) -> Tensor:
            queries = buckets(q)  # [num_queries, num_kv_heads, group, num_tables]
            found = torch.zeros(*q.shape[:2], k.shape[0], device=k.device)
            for table in range(self.num_tables):
                same = queries[..., table, None] == keys[:, table][:, None]
                found += same.sum(2)
            return found

        return score

    def bytes_per_token(self, head_dim: int) -> float:
        """The bits of all tables."""
        return self.num_tables * self.num_table_bits / 8
