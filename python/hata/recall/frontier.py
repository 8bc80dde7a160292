"""The frontier: which num_bits and top_k hold most attention for the bytes that a step reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hata.checks import check
from hata.recall.measure import Results
from hata.selectors import HataSelector
from hata.selectors.selector import CACHE_ITEMSIZE


@dataclass(frozen=True)
class Pair:
    """Settings of a layer.

    Attributes:
        num_bits: Bits of a key's code.
        top_k: Positions that each KV head attends to.
        bytes_per_step: Bytes that a step reads for each KV head: codes (and norms) of the whole
            context, keys and values of the selected positions in a 16-bit cache.
    """

    num_bits: int
    top_k: int
    bytes_per_step: float


@dataclass(frozen=True)
class Allocation:
    """Settings for all layers.

    Attributes:
        pairs: One for each layer after the dense ones.
        attention_mass: Mean over those layers and their KV heads.
    """

    pairs: tuple[Pair, ...]
    attention_mass: float

    @property
    def bytes_per_step(self) -> float:
        """Mean over the layers, for each KV head."""
        return sum(pair.bytes_per_step for pair in self.pairs) / len(self.pairs)

    def settings(self, layers: Sequence[int], num_layers: int) -> dict[str, list[int]]:
        """What `hata.HashWeights` and `hata.HataConfig` take; dense layers get the first pair.

        Args:
            layers: The model's index of each pair's layer.
            num_layers: Layers of the model.
        """
        pairs = [self.pairs[0]] * num_layers
        for layer_idx, pair in zip(layers, self.pairs, strict=True):
            pairs[layer_idx] = pair
        return {
            "num_bits": [pair.num_bits for pair in pairs],
            "top_k": [pair.top_k for pair in pairs],
        }


class Frontier:
    """Measured pairs of num_bits and top_k, and the best of them.

    Args:
        results: Of codes that differ in num_bits alone.

    Raises:
        ValueError: They differ in more.
    """

    def __init__(self, results: Results) -> None:
        where, info = "recall", results.info
        self.pairs: list[Pair] = []
        settings, mass = [], []
        for measurement in results.measurements:
            selector = measurement.selector
            codes = isinstance(selector, HataSelector)
            check(codes, where, "--frontier", "compare hash weights alone", selector.name)
            assert isinstance(selector, HataSelector)  # what check has made sure of, for mypy
            weights = selector.weights
            settings.append((weights.num_bits, weights.query_bits, weights.key_norms))
            scan = info.seq_len * selector.bytes_per_token(info.head_dim)
            row = 2 * info.head_dim * CACHE_ITEMSIZE
            self.pairs += [Pair(selector.num_bits, n, scan + n * row) for n in results.budgets]
            sparse = measurement.layers[results.first_sparse :]
            mass.append(torch.stack([layer.attention_mass.mean(0) for layer in sparse]))
        same = len({setting[1:] for setting in settings}) == 1
        distinct = len({setting[0] for setting in settings}) == len(settings)
        rule = "differ in num_bits and have query_bits and key_norms alike, for --frontier"
        got = ", ".join("{} bits, query {}, norms {}".format(*setting) for setting in settings)
        check(same and distinct, where, "--weights", rule, got)
        self._mass = torch.cat(mass, 1)  # [num_sparse_layers, num_pairs]

    def levels(self, chosen_on: "Frontier") -> list[tuple[Allocation, Allocation]]:
        """Returns, for each number of bytes read, one pair for all layers and one for each.

        Args:
            chosen_on: Measured on the text that they are chosen by; the masses are this one's.
        """
        found = []
        for uniform in chosen_on.uniform():
            chosen = (uniform, chosen_on.per_layer(uniform.bytes_per_step))
            alike, own = (replace(x, attention_mass=self.mass_of(x)) for x in chosen)
            found.append((alike, own))
        return found

    def mass_of(self, allocation: Allocation) -> float:
        """Returns the mean attention mass of settings that were chosen elsewhere."""
        chosen = [self.pairs.index(pair) for pair in allocation.pairs]
        return float(self._mass[range(len(chosen)), chosen].mean())

    def everywhere(self, pair: Pair) -> Allocation:
        """Returns the settings that give every layer this pair."""
        mass = float(self._mass[:, self.pairs.index(pair)].mean())
        return Allocation((pair,) * len(self._mass), mass)

    def uniform(self) -> list[Allocation]:
        """Returns the pairs, the same in all layers, that no cheaper one beats: cheapest first."""
        found = [self.everywhere(pair) for pair in self.pairs]
        best: list[Allocation] = []
        for allocation in sorted(found, key=lambda x: (x.bytes_per_step, -x.attention_mass)):
            if not best or allocation.attention_mass > best[-1].attention_mass:
                best.append(allocation)
        return best

    def per_layer(self, bytes_per_step: float) -> Allocation:
        """Chooses a pair for each layer within a mean number of bytes.

        Greedy: every layer starts with its cheapest pair; then the change of one layer's pair that
        gains most mass per byte is made, as long as one fits.

        Args:
            bytes_per_step: What the layers may read on average, for each KV head.

        Returns:
            The settings.
        """
        cost = torch.tensor([pair.bytes_per_step for pair in self.pairs], dtype=torch.float64)
        num_layers = len(self._mass)
        chosen = [int(cost.argmin())] * num_layers
        rows = torch.arange(num_layers)
        while True:
            now = torch.tensor(chosen)
            more = cost - cost[now][:, None]  # [num_layers, num_pairs]
            gain = self._mass - self._mass[rows, now][:, None]
            left = bytes_per_step * num_layers - float(cost[now].sum())
            useful = (gain > 0) & (more <= left)
            if not bool(useful.any()):
                mass = float(self._mass[rows, now].mean())
                return Allocation(tuple(self.pairs[i] for i in chosen), mass)
            rate = torch.where(useful, gain / more.clamp(min=1e-9), -torch.inf)
            layer, pair = divmod(int(rate.argmax()), len(self.pairs))
            chosen[layer] = pair
