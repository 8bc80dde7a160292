"""Measures selectors on captures, layer by layer and a few queries at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hata.checks import check, check_int
from hata.selectors import ExactSelector, Selector, rank
from hata.selectors.quality import DenseAttention, Quality
from hata.training.captures import Captures, LayerCapture


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure.

    Attributes:
        budgets: Positions that each KV head may select, ascending.
        device: Where to compute.
        num_sink: First positions that every selector takes, inside the budget.
        num_recent: Last visible positions, likewise.
        num_queries: Query tokens of each sequence, evenly spaced among the captured ones; None
            takes all.
        memory_limit_gb: GB for the numbers of the queries that are measured at once.

    Raises:
        TypeError: A value has another type.
        ValueError: A value breaks its rule.
    """

    budgets: tuple[int, ...]
    device: torch.device
    num_sink: int = 4
    num_recent: int = 16
    num_queries: int | None = None
    memory_limit_gb: float = 0.25

    def __post_init__(self) -> None:
        """Checks every rule."""
        where = "recall"
        check_int(where, "num_sink", self.num_sink, 0)
        check_int(where, "num_recent", self.num_recent, 0)
        ascending = list(self.budgets) == sorted(set(self.budgets)) and len(self.budgets) > 0
        check(ascending, where, "top_k", "be one or more ascending numbers", self.budgets)
        low = max(1, self.num_sink + self.num_recent)
        rule = f"be at least num_sink + num_recent={low}"
        check(self.budgets[0] >= low, where, "top_k", rule, self.budgets[0])
        if self.num_queries is not None:
            check_int(where, "num_queries", self.num_queries, 1)
        rule = "be positive"
        check(self.memory_limit_gb > 0, where, "memory_limit_gb", rule, self.memory_limit_gb)


@dataclass(frozen=True)
class Measurement:
    """What one selector found.

    Attributes:
        selector: The selector.
        layers: For each layer the means over query tokens and over the heads of a group.
    """

    selector: Selector
    layers: tuple[Quality, ...]


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
    layers = []
    for layer_idx in range(info.num_layers):
        layer = captures.layer(layer_idx, with_values=info.has_values)
        layers.append(_measure_layer(layer, layer_idx, info.softmax_scale, selectors, options))
        on_layer()
    by_selector = zip(*layers, strict=True)
    return [Measurement(*pair) for pair in zip(selectors, by_selector, strict=True)]


def _measure_layer(
    layer: LayerCapture,
    layer_idx: int,
    softmax_scale: float,
    selectors: Sequence[Selector],
    options: MeasureOptions,
) -> list[Quality]:
    exact_selector = ExactSelector()
    chunk = _queries_at_once(layer, options)
    sums: list[Quality] = []
    num_tokens = 0
    for sequence_idx in range(layer.k.shape[0]):
        k = layer.k[sequence_idx].to(options.device)
        v = None if layer.v is None else layer.v[sequence_idx].to(options.device)
        q, positions = _queries(layer, sequence_idx, options)
        exact = exact_selector.index(layer_idx, k, softmax_scale)
        scores = [selector.index(layer_idx, k, softmax_scale) for selector in selectors]
        for q_some, seen in zip(q.split(chunk), positions.split(chunk), strict=True):
            dense = DenseAttention(q_some, k, v, seen, softmax_scale)
            exact_ranks = dense.ranks(_order(exact(q_some, seen), seen, 1, options))
            found = []
            for selector, score in zip(selectors, scores, strict=True):
                order = _order(score(q_some, seen), seen, selector.page_size, options)
                found.append(dense.quality(order, exact_ranks, options.budgets, selector.page_size))
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        num_tokens += len(q)
    return [total.mean(num_tokens) for total in sums]


def _order(scores: Tensor, positions: Tensor, page_size: int, options: MeasureOptions) -> Tensor:
    return rank(
        scores,
        positions,
        options.budgets[-1],
        num_sink=options.num_sink,
        num_recent=options.num_recent,
        page_size=page_size,
    )


def _queries(
    layer: LayerCapture, sequence_idx: int, options: MeasureOptions
) -> tuple[Tensor, Tensor]:
    """One sequence's q ``[num_queries, num_kv_heads, group, head_dim]`` and positions."""
    q, positions = layer.q[sequence_idx], layer.positions[sequence_idx]
    if options.num_queries is not None and options.num_queries < len(q):
        wanted = torch.linspace(0, len(q) - 1, options.num_queries).round().long()
        q, positions = q[wanted], positions[wanted]
    q = q.unflatten(1, (layer.k.shape[2], -1)).float()
    return q.to(options.device), positions.to(options.device)


def _queries_at_once(layer: LayerCapture, options: MeasureOptions) -> int:
    """How many queries fit into the memory limit, at least one."""
    seq_len, num_kv_heads, head_dim = layer.k.shape[1:]
    num_heads = layer.q.shape[2]
    count = min(options.budgets[-1], seq_len)
    # float32 for each head: the dense shares, and logits, mask and softmax of a selector; for each
    # KV head: scores, the int64 keys of `rank` with their intermediates, ranks, gathered values.
    num_bytes = seq_len * (num_heads * 4 * 4 + num_kv_heads * 48)
    num_bytes += count * num_kv_heads * (head_dim * 4 * 2 + 64)
    return max(1, int(options.memory_limit_gb * 1e9) // num_bytes)
