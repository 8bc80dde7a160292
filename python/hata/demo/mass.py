"""The share of the dense attention mass that hata's selection holds, over one generation."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from hata.cache import HataCache
from hata.dense import attention_mass


@dataclass(frozen=True)
class _Step:
    layer_idx: int
    q: Tensor  # [batch, 1, num_heads, head_dim]
    indices: Tensor  # [batch, 1, num_kv_heads, top_k]
    seq_len: int


class MassRecorder:
    """Observes sparse decoding steps and, afterwards, weighs what they selected.

    Recording copies queries and indices alone, so that it hardly shows in the time of a step.

    Args:
        softmax_scale: Factor of the model's logits.
        softcap: Cap of the model's logits, or None.
    """

    def __init__(self, softmax_scale: float, softcap: float | None = None) -> None:
        self._logits = {"softmax_scale": softmax_scale, "softcap": softcap}
        self._steps: list[_Step] = []

    def __call__(
        self, layer_idx: int, q: Tensor, cache: HataCache, indices: Tensor, num_selected: Tensor
    ) -> None:
        """Takes one layer's step, as `hata.integrations.transformers.enable` hands it over."""
        self._steps.append(_Step(layer_idx, q.clone(), indices.clone(), cache.seq_lens[0]))

    def mass_per_layer(self, cache: HataCache) -> dict[int, float]:
        """Returns, for each sparse layer, the selected share of the dense attention mass.

        Args:
            cache: The cache of the observed generation. It is rewound to the first observed step.

        Returns:
            The mean over query heads and steps, 0 to 1, by layer.
        """
        shares = defaultdict(list)
        for step in reversed(self._steps):
            if step.seq_len < cache.seq_lens[0]:
                cache.truncate(step.seq_len)
            mass = attention_mass(step.q, cache, step.layer_idx, step.indices, **self._logits)
            shares[step.layer_idx].append(mass.mean())
        return {layer: float(torch.stack(found).mean()) for layer, found in sorted(shares.items())}
