"""Measurements as rows: the CSV files of ``hata recall``."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from hata.recall.measure import Measurement
from hata.recall.results import Results
from hata.training.captures import CaptureInfo

METRICS = ("recall", "attention_mass", "output_error")
_SELECTOR = ("selector", "recipe", "num_bits", "query_bits", "key_norms", "channels")
MEAN_COLUMNS = ("model", "context", *_SELECTOR, "top_k", "bytes_per_token", *METRICS)
HEAD_COLUMNS = ("model", "context", *_SELECTOR, "layer", "kv_head", "top_k", *METRICS)

Row = dict[str, object]


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
        for layer_idx, layer in enumerate(measurement.layers):
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
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in {**where_from, **row}.items()})


def _common(info: CaptureInfo, measurement: Measurement) -> Row:
    selector = measurement.selector
    return {
        "model": info.model,
        "context": info.seq_len,
        "selector": selector.name,
        **selector.settings,
    }


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return int(value)
    return f"{value:.5g}" if isinstance(value, float) else value
