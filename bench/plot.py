"""Pictures of the committed results: ``python -m bench plot``."""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from .plot_bars import draw_parts, draw_speedup
from .plot_lines import draw_budget, draw_crossover, draw_latency
from .plot_style import STYLE
from .records import load_steps

TITLES = {
    "latency": "One decoding step of one layer",
    "parts": "Where a step's time goes (left: the operators one by one; right: the whole step)",
    "speedup": "Speedup over the fastest dense attention of the same run",
    "crossover": "From which length a step is faster than dense attention",
    "budget": "A step's time by its budget",
}


def plot_all(results: Path, device: str, folder: Path, suffix: str) -> list[Path]:
    """Draws every picture that the rows of a device suffice for.

    Args:
        results: Folder of the CSV files.
        device: As in their names, ``decode_<device>.csv``.
        folder: Where the pictures go.
        suffix: svg or png.

    Returns:
        The files written.
    """
    steps = load_steps(results / f"decode_{device}.csv")
    pictures: dict[str, Callable[[Figure], bool]] = {
        "latency": lambda figure: draw_latency(figure, steps),
        "parts": lambda figure: draw_parts(figure, steps),
        "speedup": lambda figure: draw_speedup(figure, steps, results, device),
        "crossover": lambda figure: draw_crossover(figure, steps),
        "budget": lambda figure: draw_budget(figure, steps),
    }
    written = []
    for name, draw in pictures.items():
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(9, 4), layout="constrained")
            if draw(figure):
                figure.suptitle(f"{TITLES[name]}: {steps[0].gpu}", fontsize=10)
                path = folder / f"{name}_{device}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
    return written
