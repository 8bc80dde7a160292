"""Draws the README's picture of the idea, idea_light.svg and idea_dark.svg, beside this file.

python docs/plots/idea.py. The numbers in it are drawn, not measured, but for the bytes: 64-bit
codes, 16-bit keys and values of 128 channels, and 1.56 % of the context selected.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

NUM_TOKENS = 96
NUM_BITS = 8  # drawn of 64
PEAKS = (
    (13, 2.9, 0.6),
    (29, 3.0, 0.8),
    (51, 3.8, 1.3),
    (68, 2.7, 0.5),
    (80, 3.2, 0.7),
)  # where, height, width
NUM_SINK, NUM_RECENT, NUM_BEST = 1, 3, 10
CODE_BYTES = 64 / 8
ROW_BYTES = 2 * 2 * 128
SHARE = 1 / 64


@dataclass(frozen=True)
class Theme:
    """Colours of one picture: text, what is read, what is not."""

    name: str
    text: str
    quiet: str
    faint: str
    code: str
    selected: str


THEMES = (
    Theme("light", "#1f2328", "#59636e", "#e4e8ec", "#0072b2", "#d55e00"),
    Theme("dark", "#f0f6fc", "#9198a1", "#2a3038", "#56b4e9", "#ff8c3a"),
)


def scores_and_selection(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Makes scores with a few peaks, and selects as hata does: sinks, recent ones, the best."""
    at = np.arange(NUM_TOKENS)
    scores = random.normal(0, 0.5, NUM_TOKENS).clip(-1, 1)
    for center, height, width in PEAKS:
        scores += height * np.exp(-(((at - center) / width) ** 2) / 2)
    scores -= scores.min() - 0.15
    always = (at < NUM_SINK) | (at >= NUM_TOKENS - NUM_RECENT)
    best = np.argsort(np.where(always, -np.inf, scores))[-NUM_BEST:]
    return scores / scores.max(), always | np.isin(at, best)


def blocks(
    axes: Axes,
    left: np.ndarray | float,
    bottom: np.ndarray | float,
    width: float,
    height: float,
    color: str,
    alpha: float = 1.0,
) -> None:
    """Draws rectangles of one size and colour, as one path."""
    corners = np.array(((0, 0), (width, 0), (width, height), (0, height), (0, 0)))
    places = np.stack(np.broadcast_arrays(np.atleast_1d(left), bottom), -1)
    outlines = [Outline(place + corners, closed=True) for place in places]
    outline = Outline.make_compound_path(*outlines)
    axes.add_patch(PathPatch(outline, color=color, alpha=alpha, lw=0))


def label(axes: Axes, theme: Theme, title: str, *lines: str) -> None:
    """Writes what a row shows to the right of it."""
    box = axes.get_position()
    top = (box.y0 + box.y1) / 2 + 0.021 * len(lines)
    x = box.x1 + 0.018
    figure = axes.figure
    figure.text(x, top, title, color=theme.text, size=10.5, weight="bold", va="center")
    for i, line in enumerate(lines, 1):
        figure.text(x, top - 0.047 * i, line, color=theme.quiet, size=9, va="center")


def draw(theme: Theme) -> Figure:
    """Draws the picture: codes, scores, keys and values over the same tokens, then the bytes."""
    random = np.random.default_rng(55)
    scores, selected = scores_and_selection(random)
    bits = random.random((NUM_TOKENS, NUM_BITS)) < 0.5
    figure = Figure(figsize=(9.6, 4.5))
    left, width = 0.012, 0.655
    tokens = [
        figure.add_axes((left, bottom, width, height), xlim=(-0.6, NUM_TOKENS - 0.4))
        for bottom, height in ((0.84, 0.135), (0.565, 0.225), (0.28, 0.225))
    ]
    codes, bars, rows = tokens
    ends = figure.add_axes((left, 0.035, width, 0.13), xlim=(0, ROW_BYTES), ylim=(-0.2, 2))
    for axes in (*tokens, ends):
        axes.axis("off")

    codes.set_ylim(0, NUM_BITS)
    for value, alpha in ((True, 1.0), (False, 0.22)):
        t, i = np.nonzero(bits == value)
        blocks(codes, t - 0.36, i + 0.08, 0.72, 0.84, theme.code, alpha)
    label(codes, theme, "Codes", "8 bytes beside every key:", "all of them are read")

    bars.set_ylim(0, 1.08)
    for read, color in ((True, theme.selected), (False, theme.code)):
        t = np.nonzero(selected == read)[0]
        bars.bar(t, scores[t], width=0.72, color=color)
    ranked = selected.copy()
    ranked[:NUM_SINK] = ranked[NUM_TOKENS - NUM_RECENT :] = False
    cut = (scores[ranked].min() + scores[~selected].max()) / 2
    bars.plot((-0.5, NUM_TOKENS - 0.5), (cut, cut), color=theme.quiet, lw=0.9, ls=(0, (4, 3)))
    label(
        bars,
        theme,
        "Scores",
        "query against codes, XOR and popcount;",
        "top_k kept: the best, the first, the last",
    )

    rows.set_ylim(0, 1)
    for read, color in ((True, theme.selected), (False, theme.faint)):
        t = np.nonzero(selected == read)[0]
        for bottom in (0.0, 0.52):
            blocks(rows, t - 0.36, bottom, 0.72, 0.48, color)
    label(
        rows,
        theme,
        "Keys and values",
        "512 bytes a token: exact attention reads",
        "those of the selected tokens alone",
    )

    blocks(ends, 0, 1.15, ROW_BYTES, 0.62, theme.quiet, 0.45)
    blocks(ends, 0, 0.15, CODE_BYTES, 0.62, theme.code)
    blocks(ends, CODE_BYTES, 0.15, ROW_BYTES * SHARE, 0.62, theme.selected)
    ends.text(8, 1.45, "dense attention: 512", color=theme.text, size=9, va="center")
    ends.text(
        22,
        0.45,
        "hata: 8 of codes + 8 of selected rows (1.56 % of them)",
        color=theme.text,
        size=9,
        va="center",
    )
    label(ends, theme, "Bytes read", "for each token of context and KV head")
    return figure


def main() -> None:
    """Writes both pictures; the same code gives the same files."""
    with matplotlib.rc_context({"svg.hashsalt": "hata", "svg.fonttype": "path"}):
        for theme in THEMES:
            path = Path(__file__).with_name(f"idea_{theme.name}.svg")
            draw(theme).savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
