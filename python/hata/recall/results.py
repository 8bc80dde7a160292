"""What ``hata recall`` has measured, as tables, files and pictures take it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hata.recall.measure import Measurement
from hata.training.captures import CaptureInfo


@dataclass(frozen=True)
class Results:
    """Measurements of several selectors on the same captures.

    Attributes:
        info: Of the captures.
        measurements: One for each selector.
        budgets: Theirs, ascending.
        num_dense_layers: Leading layers that means leave out.
    """

    info: CaptureInfo
    measurements: Sequence[Measurement]
    budgets: Sequence[int]
    num_dense_layers: int

    @property
    def shown(self) -> int:
        """The index of the budget that is shown where there is room for one: about 3.1 %."""
        context = self.info.seq_len
        return min(range(len(self.budgets)), key=lambda i: abs(32 * self.budgets[i] - context))

    def means(self, measurement: Measurement, metric: str) -> list[float] | None:
        """Returns means over KV heads and the layers after the dense ones, for each budget.

        Args:
            measurement: One of them.
            metric: A field of `hata.selectors.quality.Quality`.

        Returns:
            The means; None where the metric was not measured.
        """
        found = [getattr(layer, metric) for layer in measurement.layers[self.num_dense_layers :]]
        if found[0] is None:
            return None
        means: list[float] = torch.stack(found).mean((0, 1)).tolist()
        return means

    def lost(self, measurement: Measurement) -> list[float]:
        """Returns the attention mass lost, means as `means` takes them, for each budget."""
        return [1 - mass for mass in self.means(measurement, "attention_mass") or ()]

    def mass_of_heads(self, measurement: Measurement) -> Tensor:
        """Returns the attention mass at the shown budget, ``[num_layers, num_kv_heads]``."""
        return torch.stack([x.attention_mass[:, self.shown] for x in measurement.layers])

    def only(self, measurements: Sequence[Measurement]) -> "Results":
        """Returns the same with these measurements alone."""
        return Results(self.info, measurements, self.budgets, self.num_dense_layers)
