"""Bars by shape: the parts of a step, and its speedup beside the authors' and the paper's."""

from pathlib import Path

from matplotlib.figure import Figure

from .decode import PARTS
from .plot_style import COLORS, LABELS
from .records import Layer, Step, read, table_steps

PART_COLORS = ("#E69F00", "#56B4E9", "#CC79A7")
PART_NAMES = ("encode, append", "score, select", "gather, attend")


def draw_parts(figure: Figure, steps: list[Step]) -> bool:
    """Stacked bars of the operators' times, each beside the whole step's."""
    found = table_steps(steps)
    figure.set_size_inches(11, 4.5)
    axes = figure.subplots()
    labels, x = [], 0.0
    for layer, chosen in found.items():
        first = x
        for config, step in chosen.items():
            bottom = 0.0
            for part, color in zip(PARTS, PART_COLORS, strict=True):
                axes.bar(x, step.parts[part], 0.4, bottom, color=color)
                bottom += step.parts[part]
            axes.bar(x + 0.4, step.us, 0.4, color=COLORS[config])
            axes.text(x + 0.2, max(bottom, step.us), config, ha="center", va="bottom", fontsize=8)
            x += 1
        labels.append(((first + x - 1) / 2 + 0.2, str(layer)))
        x += 0.6
    for name, color in [*zip(PART_NAMES, PART_COLORS, strict=True), *COLORS.items()]:
        label = f"whole step, {LABELS[name]}" if name in LABELS else name
        axes.bar(0, 0, color=color, label=label)
    positions, names = zip(*labels, strict=True)
    axes.set_xticks(positions, names, rotation=15)
    axes.set(ylabel="µs")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left")
    return bool(found)


def draw_speedup(figure: Figure, steps: list[Step], results: Path, device: str) -> bool:
    """Bars by shape: the authors' kernels on the same card, and hata; diamonds: the paper."""
    found = table_steps(steps)
    authors_file = results / f"authors_{device}.csv"
    rows = read(authors_file) if authors_file.is_file() else []
    authors = {
        Layer.of(row): float(row["dense_us"]) / float(row["step_us"])
        for row in rows
        if row["dense_us"]
    }
    paper = {
        Layer.of(row): float(row["dense_layer_ms"]) / float(row["hata_layer_ms"])
        for row in read(results / "paper_figure5.csv")
    }
    figure.set_size_inches(11, 4.5)
    axes = figure.subplots()
    for i, (layer, chosen) in enumerate(found.items()):
        bars = [("authors", authors.get(layer), "#999999")]
        bars += [(name, step.speedup, COLORS[name]) for name, step in chosen.items()]
        for j, (_, value, color) in enumerate(bars):
            if value is not None:
                place = i + 0.2 * (j - 1.5)
                axes.bar(place, value, 0.2, color=color)
                axes.text(place, value, f"{value:.3g}", ha="center", va="bottom", fontsize=7)
        if layer in paper:
            axes.plot(i, paper[layer], "D", color="white", mec="black", ms=5)
    if authors:
        axes.bar(0, 0, color="#999999", label="the authors' kernels, A, on the same card")
    for config, color in COLORS.items():
        axes.bar(0, 0, color=color, label=f"hata, {LABELS[config]}")
    label = "the paper's figure 5: a whole layer, on its card"
    axes.plot([], [], "D", color="white", mec="black", ms=5, label=label)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(found)), [str(layer) for layer in found], rotation=15)
    axes.set(ylabel="times faster than dense")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left")
    return any(step.speedup for chosen in found.values() for step in chosen.values())
