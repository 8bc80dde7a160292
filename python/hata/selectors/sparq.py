"""SparQ: the channels in which the query is largest."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hata.checks import check_int
from hata.selectors.channels import ChannelSelector
from hata.selectors.selector import Score, logits, visible_softmax


@dataclass(frozen=True)
class SparqSelector(ChannelSelector):
    """Attention estimated from the query's largest channels.

    ``score[t] = mean over the group's heads g of softmax_t(softmax_scale q_g[C] . k_t[C] / r_g)``,
    C the ``channels`` channels of the largest ``sum_g |q_g|`` and
    ``r_g = sqrt(|q_g[C]|_1 / |q_g|_1)``.

    Source: SparQ, arXiv 2312.04985, section 4, steps 1 and 2. Its step 3 mixes the mean value into
    the output for the mass that was not selected; it is left out, since it changes no selection and
    would serve every selector alike. Needs keys stored by channel too.
    """

    name: ClassVar[str] = "sparq"

    def index(self, layer_idx: int, k: Tensor, softmax_scale: float) -> Score:
        """Keeps the keys."""
        check_int("SparqSelector", "channels", self.channels, 1, k.shape[-1])

        def score(q: Tensor, positions: Tensor) -> Tensor:
            sizes = q.abs()
            largest = sizes.sum(2, keepdim=True).topk(self.channels).indices
            chosen = q.new_zeros(q.shape).scatter(-1, largest.expand(-1, -1, q.shape[2], -1), 1.0)
            share = (sizes * chosen).sum(-1, keepdim=True) / sizes.sum(-1, keepdim=True)
            scale = softmax_scale * share.clamp(min=1e-30).rsqrt()
            return visible_softmax(logits(q * chosen, k) * scale, positions).mean(2)

        return score
