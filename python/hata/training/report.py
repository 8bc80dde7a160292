"""What `hata train` prints and draws: loss, attention mass and recall, layer by layer."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table

from hata.pictures import picture
from hata.training.parts import LayerPart

_SMOOTHED = 20  # steps whose mean is shown: each sees one sequence, and sequences differ


def print_layers(
    console: Console,
    parts: Sequence[LayerPart],
    layers: Sequence[int],
    budgets: Sequence[int],
    dense_layers: int,
) -> None:
    """Prints a row for each layer: loss, and what held-out queries lose at each budget.

    Args:
        console: Where.
        parts: The layers.
        layers: The model's index of each.
        budgets: Values of ``top_k``.
        dense_layers: Leading layers that stay dense when decoding; the means leave them out.
    """
    table = Table("layer", "loss", title="Held-out queries: attention mass lost, recall")
    for top_k in budgets:
        table.add_column(f"top_k {top_k}", justify="right")
    for layer_idx, part in zip(layers, parts, strict=True):
        scores = [_cell(*part.scores[:, i].tolist()) for i in range(len(budgets))]
        table.add_row(str(layer_idx), _loss(part.losses), *scores)
    dense = sum(layer_idx < dense_layers for layer_idx in layers)
    sparse = torch.stack([part.scores for part in parts[dense:]] or [parts[-1].scores])
    table.add_section()
    table.add_row("mean", f"from {dense_layers}", *(_cell(*s) for s in sparse.mean(0).T.tolist()))
    console.print(table)
    console.print("mass lost (excess over the exact top-k), recall of the exact top-k")


def _cell(lost: float, lost_exact: float, recall: float) -> str:
    return f"{lost:.3f} (+{lost - lost_exact:.3f}) {recall:.0%}"


def _loss(losses: torch.Tensor) -> str:
    if len(losses) == 0:
        return "closed form"
    return f"{losses[:_SMOOTHED].mean():.3f} → {losses[-_SMOOTHED:].mean():.3f}"


def plot_layers(
    path: Path,
    parts: Sequence[LayerPart],
    layers: Sequence[int],
    budgets: Sequence[int],
    title: str,
) -> None:
    """Writes the loss curves and, per layer, excess mass lost and recall, as a PNG file.

    Args:
        path: The file.
        parts: The layers.
        layers: The model's index of each.
        budgets: Values of ``top_k``.
        title: The line above.
    """
    scores = torch.stack([part.scores for part in parts])  # [num_layers, 3, num_budgets]
    colors = mpl.colormaps["viridis"]
    with picture(path, "train", 11, 3.5) as figure:
        loss, mass, recall = figure.subplots(1, 3)
        for layer_idx, part in enumerate(parts):
            color = colors(layer_idx / max(len(parts) - 1, 1))
            means = (
                part.losses.unfold(0, _SMOOTHED, 1).mean(1)
                if len(part.losses) > 99
                else part.losses
            )
            loss.plot(means.numpy(), color=color, linewidth=0.7)
        loss.set(xlabel="step", title="loss (dark: first layers)")
        for i, top_k in enumerate(budgets):
            excess = scores[:, 0, i] - scores[:, 1, i]
            mass.plot(list(layers), excess.numpy(), marker=".", label=f"top_k {top_k}")
            recall.plot(list(layers), scores[:, 2, i].numpy(), marker=".", label=f"top_k {top_k}")
        mass.set(xlabel="layer", title="held-out mass lost, excess", ylim=(0, None))
        recall.set(xlabel="layer", title="held-out recall", ylim=(0, 1))
        mass.legend()
        figure.suptitle(title)
