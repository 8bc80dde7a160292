"""Curves: a step's time and speedup against length, batch and budget."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import PAPER_BUDGET
from .plot_style import COLORS, DENSE_COLORS, LABELS, legend_below, log_axis
from .records import DENSE_NAMES, Step, by_heads, usual


def draw_latency(figure: Figure, steps: list[Step]) -> bool:
    """Time against length at batch 1, and against batch at 32K, with dense kernels and floors."""
    panels = [
        *(
            (f"batch 1, {name}", "tokens", length, chosen)
            for name, chosen in by_heads(steps, batch=1)
        ),
        *(
            (f"32K tokens, {name}", "batch", batch, chosen)
            for name, chosen in by_heads(steps, seq_len=32 << 10)
        ),
    ]
    if not panels:
        return False
    rows = 2 if len(panels) > 2 else 1
    figure.set_size_inches(10, 4.2 * rows)
    grid = figure.subplots(rows, -(-len(panels) // rows), squeeze=False)
    for axes, (title, xlabel, x, chosen) in zip(grid.flat, panels, strict=False):
        draw_lines(axes, chosen, x)
        axes.set(title=title, xlabel=xlabel, ylabel="µs", xscale="log", yscale="log")
        log_axis(axes, sorted({x(step) for step in chosen}))
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    legend_below(figure)
    return True


def length(step: Step) -> int:
    return step.layer.seq_len


def batch(step: Step) -> int:
    return step.layer.batch


def draw_lines(axes: Axes, steps: list[Step], x: Callable[[Step], int]) -> None:
    names = [name for name in DENSE_NAMES if any(name in step.dense for step in steps)]
    for name, color in zip(names, DENSE_COLORS, strict=False):
        points = sorted({(x(s), s.dense[name]) for s in steps if name in s.dense})
        axes.plot(*zip(*points, strict=True), ":", marker=".", color=color, label=DENSE_NAMES[name])
    for config, color in COLORS.items():
        chosen = sorted((s for s in steps if s.config == config), key=x)
        if chosen:
            xs = [x(s) for s in chosen]
            axes.plot(xs, [s.us for s in chosen], "-o", color=color, label=LABELS[config], ms=4)
            floors = [s.floor_us for s in chosen]
            axes.plot(xs, floors, "--", color=color, lw=0.8, label=f"{config}: its bytes alone")


def draw_crossover(figure: Figure, steps: list[Step]) -> bool:
    """Speedup against length, one panel per batch and head layout."""
    panels = [
        (f"batch {size}, {name}", chosen)
        for size in (1, 8)
        for name, chosen in by_heads(steps, batch=size)
    ]
    if not any(step.speedup for _, chosen in panels for step in chosen):
        return False
    figure.set_size_inches(11, 3.6)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, chosen) in zip(grid, panels, strict=True):
        for config, color in COLORS.items():
            points = sorted((s.layer.seq_len, s.speedup) for s in chosen if s.config == config)
            if points:
                axes.plot(*zip(*points, strict=True), "-o", ms=4, color=color, label=LABELS[config])
        axes.axhline(1, color="black", lw=0.8)
        axes.set(title=title, xlabel="tokens")
        axes.set(xscale="log", yscale="log")
        log_axis(axes, sorted({step.layer.seq_len for step in chosen}))
        axes.tick_params(axis="x", labelrotation=90)
    grid[0].set(ylabel="times faster than dense")
    legend_below(figure)
    return True


def draw_budget(figure: Figure, steps: list[Step]) -> bool:
    """Time against the share of the sequence that is selected."""
    random = [step for step in steps if not step.captured]
    unusual = [s for s in random if s not in usual(random)]
    layers = list(dict.fromkeys(step.layer for step in unusual))
    if not layers:
        return False
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for config, color in COLORS.items():
            points = sorted(
                (100 * s.top_k / layer.seq_len, s.us, s.floor_us)
                for s in random
                if s.layer == layer and s.config == config
            )
            if points:
                xs, times, floors = zip(*points, strict=True)
                axes.plot(xs, times, "-o", ms=4, color=color, label=LABELS[config])
                axes.plot(xs, floors, "--", lw=0.8, color=color, label=f"{config}: its bytes alone")
        axes.axvline(100 * PAPER_BUDGET, color="black", lw=0.5)
        axes.set(title=str(layer), xlabel="top_k, % of the sequence", ylabel="µs", xscale="log")
        axes.set_xticks(xs, [f"{x:.2g}" for x in xs])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    legend_below(figure)
    return True
