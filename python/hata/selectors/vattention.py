"""vAttention: the best positions, and a random sample that stands for all others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.checks import check
from hata.selectors.ranking import Selection, rank
from hata.selectors.selector import Queries, Score, Selector
from hata.selectors.softmax import Softmax

_MASK = 2**32 - 1


@dataclass(frozen=True)
class VattentionSelector(Selector):
    """Half of what is left of the budget by another selector's score, half drawn from the rest.

    With T what the other selector takes, sinks and recent positions included, R the positions that
    are left and D those drawn of them, uniformly and without replacement, attention is
    ``(sum_T e^l_t v_t + |R| / |D| sum_D e^l_t v_t) / (sum_T e^l_t + |R| / |D| sum_D e^l_t)``.

    Source: vAttention, arXiv 2510.05688: its numerator and denominator. It draws as many
    positions, for each head and query, as bound the error by epsilon with probability 1 -
    delta; here the budget is given and split in halves, and a KV head's group shares the sample.
    Reads what the other selector reads.

    Attributes:
        top: The other selector, of single positions.
        seed: Draws the sample.

    Raises:
        ValueError: ``top`` selects pages, or goes by other queries.
    """

    name: ClassVar[str] = "vattention"
    top: Selector
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the rule."""
        plain = self.top.page_size == 1 and not (self.top.observes or self.top.foresees)
        rule = "select single positions by the token's own queries"
        check(plain, "VattentionSelector", "top", rule, self.top.name)

    @property
    def variant(self) -> str:
        """The other selector."""
        return f"half by {self.top.name} ({self.top.variant}), half drawn"

    @property
    def settings(self) -> dict[str, object]:
        """The other selector's, with its recipe or its name."""
        settings = self.top.settings
        recipe = settings.get("recipe", self.top.name)
        return {**settings, "recipe": f"half by {recipe}, half drawn"}

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Has the other selector index the keys."""
        return self.top.index(layer_idx, k, softmax, queries)

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
        """Takes the best of the scores, and draws from the rest."""
        places = torch.arange(scores.shape[-1], device=scores.device)
        seen = (places <= positions[:, None])[:, None]
        draws = self._draws(layer_idx, positions, *scores.shape[1:])
        selections = []
        for budget in budgets:
            num_drawn = (budget - num_sink - num_recent) // 2
            always = {"num_sink": num_sink, "num_recent": num_recent}
            best = rank(scores, positions, budget - num_drawn, **always)
            taken = torch.zeros(*scores.shape[:2], scores.shape[-1] + 1, device=scores.device)
            taken.scatter_(2, best.where(best >= 0, scores.shape[-1]), 1.0)
            rest = seen & (taken[..., :-1] == 0)
            found = draws.masked_fill(~rest, -1).topk(min(num_drawn, scores.shape[-1]))
            drawn = found.indices.where(found.values >= 0, -1)
            weight = rest.sum(-1, keepdim=True) / (drawn >= 0).sum(-1, keepdim=True).clamp(min=1)
            weights = [torch.ones_like(best, dtype=torch.float32), weight.expand(drawn.shape)]
            selections.append(Selection(torch.cat([best, drawn], -1), torch.cat(weights, -1)))
        return selections

    def bytes_per_token(self, head_dim: int) -> float:
        """Those of the other selector; drawing reads nothing."""
        return self.top.bytes_per_token(head_dim)

    def _draws(self, layer_idx: int, positions: Tensor, num_kv_heads: int, seq_len: int) -> Tensor:
        """Random numbers that depend on layer, query, KV head and position alone.

        They are the same however many queries are scored at once, on every device.

        Returns:
            ``[num_queries, num_kv_heads, seq_len]``, int64, in ``0..2**32 - 1``.
        """
        device = positions.device
        drawn = torch.full((1, 1, 1), self.seed, dtype=torch.int64, device=device)
        heads = torch.arange(num_kv_heads, device=device)[:, None]
        places = torch.arange(seq_len, device=device)
        for number in (layer_idx, positions[:, None, None], heads, places):
            drawn = _mixed(drawn + number + 1)
        return drawn


def _mixed(x: Tensor) -> Tensor:
    """Mixes 32 bits, kept in int64: the hash function "lowbias32" of C. Wellons."""
    x = x & _MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)
