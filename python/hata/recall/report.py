"""What ``hata recall`` prints and writes: tables, CSV files and the frontier as JSON."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hata.outputs import whole_file
from hata.recall.frontier import Allocation
from hata.recall.measure import Measurement, Results
from hata.recall.options import WHERE
from hata.recall.sharing import Sharing
from hata.training.captures import CaptureInfo

METRICS = ("recall", "attention_mass", "output_error")
_SELECTOR = ("selector", "recipe", "num_bits", "query_bits", "key_norms", "channels")
MEAN_COLUMNS = ("model", "context", *_SELECTOR, "top_k", "bytes_per_token", *METRICS)
HEAD_COLUMNS = ("model", "context", *_SELECTOR, "layer", "kv_head", "top_k", *METRICS)

Row = dict[str, object]
Levels = Sequence[tuple[Allocation, Allocation]]  # what `Frontier.levels` gives


def print_means(console: Console, results: Results) -> None:
    """Prints one line a selector: the attention mass lost at each budget, and two more figures."""
    info, shown = results.info, results.shown
    table = Table(
        title=f"Attention mass lost: {info.model}, {info.seq_len} tokens",
        caption=f"means over KV heads and {_layers_in_means(results)}; recall and "
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
    for layer_idx, *layer in zip(results.info.layers, *lost, strict=True):
        table.add_row(str(layer_idx), *(f"{share:.3f}" for share in layer))
    console.print(table)


def _layers_in_means(results: Results) -> str:
    info = results.info
    if info.num_layers == len(info.layer_types):
        return f"layers from {results.num_dense_layers} on"
    return "layers " + ", ".join(map(str, info.layers[results.first_sparse :]))


def mean_rows(results: Results) -> Iterator[Row]:
    """Yields a row for each selector and budget: means over heads and sparse layers."""
    for measurement in results.measurements:
        means = {name: results.means(measurement, name) for name in METRICS}
        for i, budget in enumerate(results.budgets):
            yield {
                **_common(results.info, measurement),
                "top_k": budget,
                "bytes_per_token": measurement.selector.bytes_per_token(results.info.head_dim),
                **{name: None if mean is None else mean[i] for name, mean in means.items()},
            }


def head_rows(results: Results) -> Iterator[Row]:
    """Yields a row for each selector, layer, KV head and budget."""
    for measurement in results.measurements:
        common = _common(results.info, measurement)
        for layer_idx, layer in zip(results.info.layers, measurement.layers, strict=True):
            metrics = {name: getattr(layer, name) for name in METRICS}
            for head in range(results.info.num_kv_heads):
                for i, budget in enumerate(results.budgets):
                    found = {
                        name: None if values is None else float(values[head, i])
                        for name, values in metrics.items()
                    }
                    where = {"layer": layer_idx, "kv_head": head, "top_k": budget}
                    yield {**common, **where, **found}


def write_rows(
    path: Path, columns: Sequence[str], rows: Iterable[Row], where_from: Mapping[str, str]
) -> None:
    """Writes a CSV file.

    Args:
        path: The file, in an existing folder.
        columns: Of the rows, in order.
        rows: What `mean_rows` or `head_rows` yields; columns that a row lacks stay empty, floats
            keep five digits.
        where_from: What `hata.provenance.origin` says.
    """
    names = ["gpu", "torch", "commit", "date", *columns, "command"]
    with whole_file(path, WHERE) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: cell(value) for name, value in {**where_from, **row}.items()})


def _common(info: CaptureInfo, measurement: Measurement) -> Row:
    selector = measurement.selector
    return {
        "model": info.model,
        "context": info.seq_len,
        "selector": selector.name,
        **selector.settings,
    }


def cell(value: object) -> object:
    """Returns what stands in a CSV file for a value: five digits of a float, 0 or 1 for a bool."""
    if isinstance(value, bool):
        return int(value)
    return f"{value:.5g}" if isinstance(value, float) else value


def print_frontier(console: Console, levels: Levels) -> None:
    """Prints, for each number of bytes read, the best pair overall and the best for each layer."""
    table = Table(
        title="Frontier: the most attention for the bytes read",
        caption="bytes: of a step, layer and KV head (mean over sparse layers): codes of the "
        "context, keys and values of the selected positions",
        box=SIMPLE_HEAD,
    )
    for heading in ("bytes", "num_bits", "top_k", "mass lost", "bytes", "mass lost"):
        table.add_column(heading, justify="right")
    table.add_column("per layer: num_bits x top_k (layers)")
    for uniform, layers in levels:
        counts = Counter((pair.num_bits, pair.top_k) for pair in layers.pairs)
        pair = uniform.pairs[0]
        table.add_row(
            f"{pair.bytes_per_step:.0f}",
            str(pair.num_bits),
            str(pair.top_k),
            f"{1 - uniform.attention_mass:.4f}",
            f"{layers.bytes_per_step:.0f}",
            f"{1 - layers.attention_mass:.4f}",
            ", ".join(f"{b} x {k} ({n})" for (b, k), n in sorted(counts.items())),
        )
    console.print(table)


def write_frontier(
    path: Path, results: Results, levels: Levels, where_from: Mapping[str, str]
) -> None:
    """Writes the frontier as JSON, for ``HataConfig(**level["uniform"])`` or ``["per_layer"]``."""
    info, num_dense = results.info, results.num_dense_layers
    num_layers = len(info.layer_types)
    heading = {"model": info.model, "context": info.seq_len, "num_dense_layers": num_dense}
    found = [
        {
            "bytes_per_step": uniform.bytes_per_step,
            "uniform": {"num_bits": uniform.pairs[0].num_bits, "top_k": uniform.pairs[0].top_k},
            "uniform_attention_mass": round(uniform.attention_mass, 5),
            "per_layer": layers.settings(info.layers[results.first_sparse :], num_layers),
            "per_layer_attention_mass": round(layers.attention_mass, 5),
        }
        for uniform, layers in levels
    ]
    with whole_file(path, WHERE) as partial:
        partial.write_text(json.dumps({**heading, **where_from, "levels": found}) + "\n")


def print_sharings(console: Console, results: Results, found: Sequence[Sharing]) -> None:
    """Prints which layers select best for all, for every number of them."""
    table = Table(
        title="Shared selections",
        caption=f"top_k {results.budgets[results.shown]}; means over KV heads and "
        f"{_layers_in_means(results)}",
        box=SIMPLE_HEAD,
    )
    for heading in ("selecting", "mass lost"):
        table.add_column(heading, justify="right")
    table.add_column("layers")
    for sharing in found:
        layers = " ".join(map(str, _model_layers(results, sharing)))
        lost = f"{1 - sharing.attention_mass:.4f}"
        table.add_row(str(len(sharing.selecting)), lost, layers)
    console.print(table)


def write_sharings(
    path: Path, results: Results, found: Sequence[Sharing], where_from: Mapping[str, str]
) -> None:
    """Writes them as JSON; a level's ``share_selection`` is what `hata.HataConfig` takes."""
    info, top_k = results.info, results.budgets[results.shown]
    heading = {"model": info.model, "context": info.seq_len, "top_k": top_k}
    heading["num_dense_layers"] = results.num_dense_layers
    levels = [
        {
            "share_selection": _model_layers(results, sharing),
            "attention_mass": round(sharing.attention_mass, 5),
        }
        for sharing in found
    ]
    with whole_file(path, WHERE) as partial:
        partial.write_text(json.dumps({**heading, **where_from, "levels": levels}) + "\n")


def _model_layers(results: Results, sharing: Sharing) -> list[int]:
    layers = results.info.layers[results.first_sparse :]
    return [layers[i] for i in sharing.selecting]
