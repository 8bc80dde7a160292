"""The frontier on the terminal and as JSON that `hata.HataConfig` takes."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hata.recall.frontier import Frontier
from hata.training.captures import CaptureInfo


def print_frontier(console: Console, chosen_on: Frontier, frontier: Frontier) -> None:
    """Prints, for each number of bytes read, the best pair overall and the best for each layer.

    Args:
        console: Where to print.
        chosen_on: Measured on the text that the pairs are chosen by.
        frontier: Measured on held-out text, which the mass is of.
    """
    table = Table(
        title="Frontier: the most attention for the bytes read",
        caption="bytes: of a step, layer and KV head (mean over sparse layers): codes of the "
        "context, keys and values of the selected positions",
        box=SIMPLE_HEAD,
    )
    for heading in ("bytes", "num_bits", "top_k", "mass lost", "bytes", "mass lost"):
        table.add_column(heading, justify="right")
    table.add_column("per layer: num_bits x top_k (layers)")
    for uniform in chosen_on.uniform():
        layers = chosen_on.per_layer(uniform.bytes_per_step)
        counts = Counter((pair.num_bits, pair.top_k) for pair in layers.pairs)
        pair = uniform.pairs[0]
        table.add_row(
            f"{pair.bytes_per_step:.0f}",
            str(pair.num_bits),
            str(pair.top_k),
            f"{1 - frontier.mass_of(uniform):.4f}",
            f"{layers.bytes_per_step:.0f}",
            f"{1 - frontier.mass_of(layers):.4f}",
            ", ".join(f"{b} x {k} ({n})" for (b, k), n in sorted(counts.items())),
        )
    console.print(table)


def write_frontier(
    path: Path,
    info: CaptureInfo,
    chosen_on: Frontier,
    frontier: Frontier,
    where_from: Mapping[str, str],
) -> None:
    """Writes the frontier: "top_k" for `HataConfig`, "num_bits" for `HashWeights.from_layers`.

    Args:
        path: The JSON file.
        info: Of the captures.
        chosen_on: Measured on the text that the pairs are chosen by.
        frontier: Measured on held-out text, which the mass is of.
        where_from: What `hata.provenance.origin` says.
    """
    levels = []
    for uniform in chosen_on.uniform():
        layers = chosen_on.per_layer(uniform.bytes_per_step)
        pair = uniform.pairs[0]
        levels.append(
            {
                "bytes_per_step": pair.bytes_per_step,
                "uniform": {"num_bits": pair.num_bits, "top_k": pair.top_k},
                "uniform_attention_mass": round(frontier.mass_of(uniform), 5),
                "per_layer": layers.settings(frontier.num_dense_layers),
                "per_layer_attention_mass": round(frontier.mass_of(layers), 5),
            }
        )
    heading = {
        "model": info.model,
        "context": info.seq_len,
        "num_dense_layers": frontier.num_dense_layers,
        **where_from,
    }
    path.write_text(json.dumps({**heading, "levels": levels}) + "\n")
