"""Pictures as files, drawn with matplotlib, which is an extra."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from hata.outputs import whole_file


@contextmanager
def picture(path: Path, function: str, width: float, height: float) -> Iterator[Figure]:
    """Gives a figure of this size in inches to draw on, and writes it at the end of the block.

    Raises:
        ValueError: It cannot be written.
    """
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with whole_file(path, function) as partial:
            figure.savefig(partial, dpi=150)
