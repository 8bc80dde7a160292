"""InfiniGen: attention foreseen from the layer before, over some channels of skewed keys."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.checks import check_int
from hata.selectors.channels import ChannelSelector
from hata.selectors.selector import Queries, Score, products
from hata.selectors.softmax import Softmax


@dataclass(frozen=True)
class InfinigenSelector(ChannelSelector):
    """Attention estimated with foreseen queries and the channels that hold most of the queries.

    ``score[t] = mean over the group's heads g of softmax_t(softmax_scale (q'_g A)[C] .
    (k_t A)[C])``: q' are the queries that this layer's weights make of the attention input of the
    layer before, A the right singular vectors of the prompt's queries of a KV head, and C the
    ``channels`` channels with the largest sum of ``|q A|`` over them.

    Source: InfiniGen, arXiv 2406.19707: keys are fetched from the CPU while the layer before is
    computed, and three tenths of the channels foresee which. It takes A from another text, once for
    a model; here it is of the prompt's own queries, which serve it better. It takes as many keys as
    come within a distance of the best logit; here the budget is given. ``hata recall`` leaves it
    out: captures hold no layer's input. A layer with no attention before it uses its own queries.
    """

    name: ClassVar[str] = "infinigen"
    observes: ClassVar[bool] = True
    foresees: ClassVar[bool] = True

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Keeps keys and queries."""
        observed = Queries.needed_by("InfinigenSelector", queries)
        check_int("InfinigenSelector", "channels", self.channels, 1, k.shape[-1])

        def score(q: Tensor, positions: Tensor) -> Tensor:
            seen = observed.q[: int(observed.before(positions[:1]))].float().transpose(0, 1)
            seen = seen.flatten(1, 2)  # [num_kv_heads, queries of all heads, head_dim]
            skew = torch.linalg.eigh(seen.mT @ seen).eigenvectors
            largest = (seen @ skew).abs().sum(1).topk(self.channels).indices
            skew = skew.gather(2, largest[:, None].expand(-1, k.shape[-1], -1))
            some_q = torch.einsum("qhgd,hdc->qhgc", q, skew)
            some_k = torch.einsum("shd,hdc->shc", k.float(), skew)
            return softmax.shares(products(some_q, some_k), positions).mean(2)

        return score
