"""Measurements on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hata.recall.results import Results


def print_means(console: Console, results: Results) -> None:
    """Prints one line a selector: the attention mass lost at each budget, and two more figures."""
    info, shown = results.info, results.shown
    table = Table(
        title=f"Attention mass lost: {info.model}, {info.seq_len} tokens",
        caption=f"means over KV heads and layers from {results.num_dense_layers} on; recall and "
        f"output error at top_k {results.budgets[shown]}",
        box=SIMPLE_HEAD,
    )
    table.add_column("selector")
    budgets = (f"top_k {budget}" for budget in results.budgets)
    for heading in ("bytes/token", *budgets, "recall", "output error"):
        table.add_column(heading, justify="right")
    for measurement in results.measurements:
        selector = measurement.selector
        recall = results.means(measurement, "recall") or ()
        error = results.means(measurement, "output_error")
        table.add_row(
            f"{selector.name}: {selector.variant}",
            f"{selector.bytes_per_token(info.head_dim):g}",
            *(f"{share:.4f}" for share in results.lost(measurement)),
            f"{recall[shown]:.3f}",
            f"{error[shown]:.4f}" if error else "",
        )
    console.print(table)


def print_layers(console: Console, results: Results) -> None:
    """Prints one line a layer: the attention mass that each selector loses at one budget."""
    title = f"Attention mass lost, layer by layer: top_k {results.budgets[results.shown]}"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    lost = []
    for measurement in results.measurements:
        selector = measurement.selector
        table.add_column(f"{selector.name}: {selector.variant}", justify="right")
        lost.append((1 - results.mass_of_heads(measurement).mean(1)).tolist())
    for layer_idx, layer in enumerate(zip(*lost, strict=True)):
        table.add_row(str(layer_idx), *(f"{share:.3f}" for share in layer))
    console.print(table)
