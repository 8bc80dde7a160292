"""Measures selectors on captures, layer by layer and a few queries at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hata.recall.options import MeasureOptions
from hata.selectors import ExactSelector, Queries, Selector, rank
from hata.selectors.quality import DenseAttention, Quality
from hata.training.captures import CaptureInfo, Captures, LayerCapture


@dataclass(frozen=True)
class Measurement:
    """What one selector found.

    Attributes:
        selector: The selector.
        layers: For each layer the means over query tokens and over the heads of a group.
    """

    selector: Selector
    layers: tuple[Quality, ...]


@dataclass(frozen=True)
class Results:
    """Measurements of several selectors on the same captures.

    Attributes:
        info: Of the captures.
        measurements: One for each selector.
        budgets: Theirs, ascending.
        num_dense_layers: The model's leading layers that means leave out.
    """

    info: CaptureInfo
    measurements: Sequence[Measurement]
    budgets: Sequence[int]
    num_dense_layers: int

    @property
    def first_sparse(self) -> int:
        """The first captured layer that stands in the means."""
        return sum(layer_idx < self.num_dense_layers for layer_idx in self.info.layers)

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
        found = [getattr(layer, metric) for layer in measurement.layers[self.first_sparse :]]
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


@torch.inference_mode()
def measure(
    captures: Captures,
    selectors: Sequence[Selector],
    options: MeasureOptions,
    on_layer: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Measures selectors on the same queries.

    No more than a few queries' numbers exist at once, so that 128K keys fit into little memory.
    Deterministic.

    Args:
        captures: Queries and keys (and, for the output's error, values) of held-out text.
        selectors: What to measure.
        options: How.
        on_layer: Called after each layer.

    Returns:
        One measurement for each selector, in order.

    Raises:
        ValueError: The captures' files are damaged, or a selector does not fit the model.
    """
    info = captures.info
    budgets = options.budgets(info.seq_len)
    layers = []
    for layer_idx in range(info.num_layers):
        layer = captures.layer(layer_idx, with_values=info.has_values)
        measured = _measure_layer(layer, layer_idx, selectors, budgets, options)
        layers.append(measured)
        on_layer()
    by_selector = zip(*layers, strict=True)
    return [Measurement(*pair) for pair in zip(selectors, by_selector, strict=True)]


def _measure_layer(
    layer: LayerCapture,
    layer_idx: int,
    selectors: Sequence[Selector],
    budgets: Sequence[int],
    options: MeasureOptions,
) -> list[Quality]:
    device = options.torch_device()
    always = {"num_sink": options.num_sink, "num_recent": options.num_recent}
    softmax = layer.softmax.to(device)
    exact_selector = ExactSelector()
    chunk = queries_at_once(layer, budgets[-1], options)
    sums: list[Quality] = []
    num_tokens = 0
    for sequence_idx in range(layer.k.shape[0]):
        k = layer.k[sequence_idx].to(device)
        v = None if layer.v is None else layer.v[sequence_idx].to(device)
        captured = captured_queries(layer, sequence_idx, options)
        q, positions = measured_queries(captured, options)
        exact = exact_selector.index(layer_idx, k, softmax)
        scores = [selector.index(layer_idx, k, softmax, captured) for selector in selectors]
        for q_some, seen in zip(q.split(chunk), positions.split(chunk), strict=True):
            dense = DenseAttention(q_some, k, v, seen, softmax)
            exact_ranks = dense.ranks(rank(exact(q_some, seen), seen, budgets[-1], **always))
            found = []
            for selector, score in zip(selectors, scores, strict=True):
                scored = score(q_some, seen)
                selections = selector.select(layer_idx, scored, seen, budgets, **always)
                found.append(dense.quality(selections, exact_ranks, budgets))
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        num_tokens += len(q)
    return [total.mean(num_tokens) for total in sums]


def captured_queries(layer: LayerCapture, sequence_idx: int, options: MeasureOptions) -> Queries:
    """The captured queries of one sequence."""
    q = layer.q[sequence_idx].unflatten(1, (layer.k.shape[2], -1)).float()
    device = options.torch_device()
    return Queries(q.to(device), layer.positions[sequence_idx].to(device))


def measured_queries(captured: Queries, options: MeasureOptions) -> tuple[Tensor, Tensor]:
    """Those of them that are measured: ``[num_queries, ...]`` and their positions."""
    num_captured, number = len(captured.q), options.num_queries
    if number is None or number >= num_captured:
        return captured.q, captured.positions
    wanted = torch.linspace(0, num_captured - 1, number).round().long().to(captured.q.device)
    return captured.q[wanted], captured.positions[wanted]


def queries_at_once(layer: LayerCapture, largest: int, options: MeasureOptions) -> int:
    """How many queries fit into the memory limit, at least one."""
    seq_len, num_kv_heads, head_dim = layer.k.shape[1:]
    num_heads = layer.q.shape[2]
    count = min(largest, seq_len)
    # float32 for each head: the dense shares, and logits, mask and softmax of a selector; for each
    # KV head: scores, the int64 keys of `rank` with their intermediates, ranks, gathered values.
    num_bytes = seq_len * (num_heads * 4 * 4 + num_kv_heads * 48)
    num_bytes += count * num_kv_heads * (head_dim * 4 * 2 + 64)
    return max(1, int(options.memory_limit_gb * 1e9) // num_bytes)
