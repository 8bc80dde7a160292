"""What a benchmark hands over: one table on the terminal and one CSV file."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hata.checks import check
from hata.provenance import device_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FILE_WIDTH = 300  # where the output is not a terminal: no table is wider

Row = dict[str, Any]


def slug(device: torch.device) -> str:
    """Returns the device's name for a file: "h100" for an NVIDIA H100 80GB HBM3, or "cpu"."""
    if device.type == "cpu":
        return "cpu"
    name = device_name(device).removeprefix("NVIDIA ")
    name = re.split(r"[ -](?=\d+GB|SXM|PCIe|HBM|NVL)", name)[0]
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


class Report:
    """Collects rows and writes each to the CSV file at once, so that a run cut short leaves them.

    Args:
        path: The CSV file; its folder exists.
        columns: Of the rows, in order.
        common: The columns of ``origin``.
        append: Whether the rows that the file has stay; their columns must be these.

    Raises:
        ValueError: The file to append to has other columns.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], common: Row, append: bool = False
    ) -> None:
        self.path = path
        self.columns = ["gpu", "torch", "commit", "date", *columns, "command"]
        self.common = common
        self.rows: list[Row] = []
        self._continues = append and path.is_file() and path.stat().st_size > 0
        if self._continues:
            with path.open(newline="") as file:
                same = next(csv.reader(file)) == self.columns
            check(same, "bench", "--append", "find the columns of this version", path)

    def add(self, row: Row) -> None:
        """Appends one row; columns that it lacks stay empty, floats keep four digits."""
        self.rows.append(self.common | row)
        with self.path.open("a" if self._continues else "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            if not self._continues:
                writer.writeheader()
            values = self.rows[-1]
            writer.writerow({column: cell(values.get(column)) for column in self.columns})
        self._continues = True

    def show(self, console: Console, columns: dict[str, str], title: str, caption: str) -> None:
        """Prints the rows; ``columns`` maps a column to its heading, empty ones are left out."""
        device = "{gpu}, torch {torch}, commit {commit}".format(**self.common)
        table = Table(title=f"{title}: {device}", caption=caption, box=SIMPLE_HEAD)
        filled = [name for name in columns if any(row.get(name) is not None for row in self.rows)]
        for name in filled:
            table.add_column(columns[name], justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(cell(row.get(name)) for name in filled))
        if not console.is_terminal:
            console.width = FILE_WIDTH
        console.print(table)


def cell(value: object) -> str:
    """Formats one value: floats with four significant digits, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
