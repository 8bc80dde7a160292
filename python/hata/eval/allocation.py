"""Budgets of each layer's own, chosen by what a layer does to the model's output.

Where layer l alone is sparse, with k positions for each KV head, ``KL(dense || sparse)`` falls with
k as a power, alike in all layers but for a weight of each::

    KL_l(k) = weight_l * c * k ** -exponent

Budgets with a given sum for which ``sum_l KL_l(k_l)`` is least are then proportional to
``weight_l ** (1 / (1 + exponent))``.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hata.eval.decode import SparseDecoder
from hata.eval.rows import compare
from hata.eval.setting import DENSE_LAYER, Setting
from hata.eval.tasks import Sample

_MOST = 4  # times the mean budget that a layer's is at most

# What a layer keeps at least of the positions that it chooses, beside sinks and recent ones. A loss
# over ordinary text does not see the layers that find what few queries look for: without this limit
# SmolLM2 lost every needle that it found with one budget for all (docs/eval.md).
_LEAST = 0.5

_ROUNDING = 1e-9  # nats: a layer that is not heard has a KL of nothing, or a little less


@dataclass(frozen=True)
class LayerLosses:
    """What single sparse layers cost.

    Attributes:
        budgets: Positions that each KV head attended to, at least two numbers.
        kl: ``[num_layers, num_budgets]``, float64: KL(dense || sparse) where one layer alone is
            sparse, in nats, mean over tokens.
    """

    budgets: tuple[int, ...]
    kl: Tensor

    def near(self, top_k: int) -> "LayerLosses":
        """Returns what was measured from half of a budget to twice as much."""
        near = [i for i, x in enumerate(self.budgets) if top_k // 2 <= x <= 2 * top_k]
        return LayerLosses(tuple(self.budgets[i] for i in near), self.kl[:, near])

    @property
    def _positive(self) -> Tensor:
        return self.kl.clamp(min=_ROUNDING)

    def weights(self) -> Tensor:
        """Returns each layer's loss as a share of the mean layer's, mean over budgets."""
        return (self._positive / self._positive.mean(0)).mean(1)

    def exponent(self) -> float:
        """Returns how steeply the mean loss falls: a line over logarithms, by least squares."""
        x = torch.tensor(self.budgets, dtype=torch.float64).log()
        y, x = self._positive.mean(0).log(), x - x.mean()
        return max(0.0, float(-(x * y).sum() / x.square().sum()))

    def share_out(self, top_k: int, always: int) -> list[int]:
        """Chooses a budget for each layer: one position more goes where it gains most.

        Each keeps half of the positions that it chooses with ``top_k``, rounded up, and has at most
        four times ``top_k``.

        Args:
            top_k: Their mean.
            always: How many of the positions all take, sinks and recent ones; at most ``top_k``.

        Returns:
            ``[num_layers]``, whose sum is ``num_layers * top_k``.
        """
        weights, steepness = self.weights().tolist(), self.exponent() + 1
        low, high = top_k - int((1 - _LEAST) * (top_k - always)), top_k * _MOST
        chosen = [low] * len(weights)

        def gain(layer: int) -> float:
            full = chosen[layer] >= high
            return -1.0 if full else float(weights[layer] * (chosen[layer] + 0.5) ** -steepness)

        waiting = [(-gain(layer), layer) for layer in range(len(weights))]
        heapq.heapify(waiting)
        for _ in range((top_k - low) * len(weights)):
            layer = waiting[0][1]
            chosen[layer] += 1
            heapq.heapreplace(waiting, (-gain(layer), layer))
        return chosen


def layer_losses(
    decoder: SparseDecoder,
    samples: Sequence[Sample],
    setting: Setting,
    layers: Sequence[int],
    budgets: Sequence[int],
    on_decoded: Callable[[], None] = lambda: None,
) -> LayerLosses:
    """Decodes with one layer sparse at a time.

    Args:
        decoder: Has the model.
        samples: Text to decode.
        setting: How the layer selects; its budget and dense layers do not matter.
        layers: The model's layers to measure, ascending.
        budgets: Positions that each KV head of the layer attends to.
        on_decoded: Called after each sample, layer and budget.
    """
    kl = torch.zeros(len(layers), len(budgets), dtype=torch.float64)
    for sample in samples:
        decoder.read(sample.prompt_ids)
        tokens = sample.decoded_ids[:-1]
        dense = decoder.decode(tokens).log_softmax(1)
        for (i, layer), (j, budget) in itertools.product(enumerate(layers), enumerate(budgets)):
            alone = (DENSE_LAYER,) * layer + (budget,) + (DENSE_LAYER,) * (layers[-1] - layer)
            one = replace(setting, top_k=alone, num_dense_layers=0)
            sparse = decoder.decode(tokens, one).log_softmax(1)
            kl[i, j] += compare(sample, dense, sparse).kl / len(samples)
            on_decoded()
    return LayerLosses(tuple(budgets), kl)
