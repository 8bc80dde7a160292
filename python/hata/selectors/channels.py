"""Loki and SparQ: attention estimated from some channels of the keys."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hata.checks import check_int
from hata.selectors.selector import CACHE_ITEMSIZE, Queries, Score, Selector, products
from hata.selectors.softmax import Softmax


@dataclass(frozen=True)
class ChannelSelector(Selector):
    """What both have in common; reads ``2 channels`` bytes a token.

    Attributes:
        channels: Channels that are read of each key, at least 1.

    Raises:
        TypeError: ``channels`` is no int.
        ValueError: ``channels`` is out of range.
    """

    channels: int

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_int(type(self).__name__, "channels", self.channels, 1)

    @property
    def variant(self) -> str:
        """The number of channels."""
        return f"{self.channels} channels"

    @property
    def settings(self) -> dict[str, object]:
        """The number of channels, by name."""
        return {"channels": self.channels}

    def bytes_per_token(self, head_dim: int) -> float:
        """The read channels' bytes."""
        return CACHE_ITEMSIZE * self.channels


@dataclass(frozen=True)
class LokiSelector(ChannelSelector):
    """Attention estimated from the first principal components of the keys.

    ``score[t] = mean over the group's heads g of softmax_t(softmax_scale (q_g P) . (k_t P))``, P
    the first ``channels`` principal components of the KV head's keys.

    Source: Loki, arXiv 2406.02542, algorithm 1, with the components of keys after the rotary
    embedding, as they are cached.

    Attributes:
        channels: Components that are kept, 1 to ``head_dim``.
        components: ``[num_layers, num_kv_heads, head_dim, head_dim]``, as `key_components` gives
            them.
    """

    name: ClassVar[str] = "loki"
    components: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_int("LokiSelector", "channels", self.channels, 1, self.components.shape[-1])

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Projects the keys."""
        projection = self.components[layer_idx, ..., : self.channels].to(k.device)
        keys = torch.einsum("shd,hdc->shc", k.float(), projection)

        def score(q: Tensor, positions: Tensor) -> Tensor:
            queries = torch.einsum("qhgd,hdc->qhgc", q, projection)
            return softmax.shares(products(queries, keys), positions).mean(2)

        return score


def key_components(layers: Iterable[Tensor], device: torch.device) -> Tensor:
    """Fits the principal components of every KV head's keys.

    Args:
        layers: Each layer's keys, ``[num_keys, num_kv_heads, head_dim]``, after the rotary
            embedding, of text that is not measured on; read one after the other.
        device: Where to compute.

    Returns:
        ``[num_layers, num_kv_heads, head_dim, head_dim]``, float32, on the CPU: columns are
        orthonormal, those of the largest variance first.
    """
    components = []
    for layer in layers:
        keys = layer.to(device).float()
        keys = keys - keys.mean(0)
        covariance = torch.einsum("nhd,nhe->hde", keys, keys).double()
        components.append(torch.linalg.eigh(covariance).eigenvectors.flip(-1).float().cpu())
    return torch.stack(components)


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

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Keeps the keys."""
        check_int("SparqSelector", "channels", self.channels, 1, k.shape[-1])

        def score(q: Tensor, positions: Tensor) -> Tensor:
            sizes = q.abs()
            largest = sizes.sum(2, keepdim=True).topk(self.channels).indices
            chosen = q.new_zeros(q.shape).scatter(-1, largest.expand(-1, -1, q.shape[2], -1), 1.0)
            share = (sizes * chosen).sum(-1, keepdim=True) / sizes.sum(-1, keepdim=True)
            scale = share.clamp(min=1e-30).rsqrt()
            return softmax.shares(products(q * chosen, k) * scale, positions).mean(2)

        return score
