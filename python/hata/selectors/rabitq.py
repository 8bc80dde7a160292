"""RaBitQCache: attention estimated from a bit for each channel of rotated keys."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.selectors.selector import Queries, Score, Selector, products
from hata.selectors.softmax import Softmax

_QUERY_LEVEL = 7  # a 4-bit query: integers in -7..7


@dataclass(frozen=True)
class RabitqSelector(Selector):
    """Unbiased estimates of the logits from binary keys and 4-bit queries.

    With m the mean key, R a random rotation, ``r_t = R (k_t - m)``, ``s_t = sign(r_t)`` and q' the
    4-bit ``R q``: ``score[t] = mean over the group's heads g of
    softmax_t(softmax_scale q'_g . s_t |r_t|^2 / |r_t|_1)``. ``q . m`` is the same for all positions
    and leaves the softmax as it is.

    Source: RaBitQCache, arXiv 2606.31519, as its abstract describes it, with the estimator of
    RaBitQ, arXiv 2405.12497. It lets each query take as many positions as hold a share p of the
    estimated attention; here the budget is given, as for every selector. The mean is of all keys
    that are indexed, and queries are rounded to the nearest level, where RaBitQ rounds at random.
    Reads ``head_dim / 8`` bytes of bits and 2 of the factor.

    Attributes:
        seed: Draws the rotations.
    """

    name: ClassVar[str] = "rabitq"
    seed: int = 0

    @property
    def variant(self) -> str:
        """The query's bits."""
        return "1-bit keys, 4-bit query"

    @property
    def settings(self) -> dict[str, object]:
        """The query's bits, by name."""
        return {"query_bits": 4}

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Centres and rotates the keys, and keeps their signs and factors."""
        _, num_kv_heads, head_dim = k.shape
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(num_kv_heads, head_dim, head_dim, generator=generator)
        rotation = torch.linalg.qr(drawn).Q.to(k.device)
        keys = torch.einsum("shd,hde->she", k.float() - k.float().mean(0), rotation)
        sizes = keys.abs().sum(-1, keepdim=True).clamp(min=1e-30)
        signs = torch.where(keys > 0, 1.0, -1.0) * (keys.square().sum(-1, keepdim=True) / sizes)

        def score(q: Tensor, positions: Tensor) -> Tensor:
            queries = torch.einsum("qhgd,hde->qhge", q, rotation)
            step = queries.abs().amax(-1, keepdim=True).clamp(min=1e-30) / _QUERY_LEVEL
            rounded = (queries / step).round() * step
            return softmax.shares(products(rounded, signs), positions).mean(2)

        return score

    def bytes_per_token(self, head_dim: int) -> float:
        """The key's bits and its factor."""
        return head_dim / 8 + 2
