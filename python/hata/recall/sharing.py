"""Layers that share a selection: which ones select, for every number of them.

``mass[a, l]`` is the attention that layer l pays to what layer a has selected for the same query
tokens and KV heads. The layers that select are those for which all layers together find most::

    sum_l mass[a(l), l],   a(l) the last selecting layer up to l

by dynamic programming over the layers. Source: Kascade, arXiv 2512.16391, which also pairs the KV
heads of two layers; here a head takes the selection of the head of its number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hata.checks import check
from hata.recall.measure import captured_queries, measured_queries, queries_at_once
from hata.recall.options import WHERE, MeasureOptions
from hata.selectors import Selector
from hata.selectors.quality import DenseAttention
from hata.training.captures import Captures


@dataclass(frozen=True)
class Sharing:
    """Layers that select for all.

    Attributes:
        selecting: The layers, counted from the first sparse one, ascending.
        attention_mass: Mean over all sparse layers and their KV heads.
    """

    selecting: tuple[int, ...]
    attention_mass: float


@torch.inference_mode()
def shared_mass(
    captures: Captures,
    selector: Selector,
    top_k: int,
    first_sparse: int,
    options: MeasureOptions,
    on_layer: Callable[[], None] = lambda: None,
) -> Tensor:
    """Measures what each layer finds with the selection of each one before it.

    Args:
        captures: Queries and keys.
        selector: Selects.
        top_k: Positions that each KV head selects.
        first_sparse: The first captured layer that is not dense.
        options: How to measure.
        on_layer: Called after each sparse layer.

    Returns:
        ``mass[a, l]``, ``[num_sparse_layers, num_sparse_layers]``, float64, on the CPU: mean over
        query tokens and KV heads; zeros where l < a.

    Raises:
        ValueError: The captures' files are damaged, their layers have queries of other tokens, or
            the selector does not fit the model.
    """
    info, device = captures.info, options.torch_device()
    num_layers = info.num_layers - first_sparse
    mass = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    always = {"num_sink": options.num_sink, "num_recent": options.num_recent}
    selected: list[list[Tensor]] = []  # of each layer so far, the indices of each piece of queries
    positions = captures.layer(first_sparse).positions
    for layer_idx in range(num_layers):
        number = first_sparse + layer_idx
        layer = captures.layer(number)
        same = torch.equal(layer.positions, positions)
        check(same, WHERE, "captures", "have the same query tokens in all layers", "others")
        softmax, chunk = layer.softmax.to(device), queries_at_once(layer, top_k, options)
        selected.append([])
        num_tokens = piece = 0
        for sequence_idx in range(layer.k.shape[0]):
            k = layer.k[sequence_idx].to(device)
            captured = captured_queries(layer, sequence_idx, options)
            q, seen = measured_queries(captured, options)
            score = selector.index(number, k, softmax, captured)
            for q_some, seen_some in zip(q.split(chunk), seen.split(chunk), strict=True):
                scores = score(q_some, seen_some)
                (own,) = selector.select(number, scores, seen_some, [top_k], **always)
                selected[-1].append(own.indices.int())
                dense = DenseAttention(q_some, k, None, seen_some, softmax)
                for other, pieces in enumerate(selected):
                    found = dense.attention_mass(pieces[piece].long())
                    mass[other, layer_idx] += found.mean().cpu()
                piece += 1
            num_tokens += len(q)
        mass[:, layer_idx] /= num_tokens
        on_layer()
    return mass


def sharings(mass: Tensor) -> list[Sharing]:
    """Chooses the layers that select, for every number of them from one to all.

    Args:
        mass: As `shared_mass` returns it.

    Returns:
        The best choice with one layer that selects, with two, and so on.
    """
    num_layers = len(mass)
    sums = torch.zeros(num_layers, num_layers + 1, dtype=torch.float64)
    sums[:, 1:] = mass.double().cumsum(1)
    # best[j] is the most that layers 0 to j - 1 find with so many that select, last[j] the last.
    best = torch.full((num_layers + 1,), -torch.inf, dtype=torch.float64)
    best[0] = 0
    chosen: list[list[int]] = []
    found = []
    for _ in range(num_layers):
        # With layer a the last that selects, [a, j]: what its followers find is added.
        total = best[:num_layers, None] + sums - sums.gather(1, torch.arange(num_layers)[:, None])
        total = total.where(torch.ones_like(total).triu(1).bool(), -torch.inf)
        best, last = total.max(0)
        chosen.append(last.tolist())
        selecting, end = [], num_layers
        for choice in reversed(chosen):
            end = choice[end]
            selecting.append(end)
        found.append(Sharing(tuple(reversed(selecting)), float(best[num_layers]) / num_layers))
    return found


def measured_on(mass: Tensor, chosen: Sequence[Sharing]) -> list[Sharing]:
    """Returns the same choices with what they find on another text.

    Args:
        mass: As `shared_mass` returns it, of that text.
        chosen: What `sharings` has chosen.
    """
    layers = torch.arange(len(mass))
    found = []
    for sharing in chosen:
        selecting = torch.tensor(sharing.selecting)
        followed = selecting[torch.searchsorted(selecting, layers, right=True) - 1]
        found.append(replace(sharing, attention_mass=float(mass[followed, layers].mean())))
    return found
