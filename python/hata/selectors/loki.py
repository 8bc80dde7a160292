"""Loki: keys in their principal components, of which the first are enough."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hata.checks import check_int
from hata.selectors.channels import ChannelSelector
from hata.selectors.selector import Score, logits, visible_softmax


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

    def index(self, layer_idx: int, k: Tensor, softmax_scale: float) -> Score:
        """Projects the keys."""
        projection = self.components[layer_idx, ..., : self.channels].to(k.device)
        keys = torch.einsum("shd,hdc->shc", k.float(), projection)

        def score(q: Tensor, positions: Tensor) -> Tensor:
            queries = torch.einsum("qhgd,hdc->qhgc", q, projection)
            return visible_softmax(logits(queries, keys) * softmax_scale, positions).mean(2)

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
