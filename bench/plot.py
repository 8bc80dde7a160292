"""Pictures of the committed results: ``python -m bench plot``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hata.outputs import whole_file

from .cases import CONFIGS, PAPER_BUDGET, tokens
from .decode import PARTS
from .records import DENSE_NAMES, Step, by_heads, load_steps, read, shape_of, table_steps, usual

# Okabe and Ito's palette, which readers with colour blindness can tell apart.
COLORS = {"A": "#0072B2", "B": "#D55E00", "C": "#009E73"}
DENSE_COLORS = ("#000000", "#777777", "#AA7744", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
LABELS = {config.name: str(config) for config in CONFIGS}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "hata",  # the same rows give the same file
    "svg.fonttype": "none",
}
PART_COLORS = ("#E69F00", "#56B4E9", "#CC79A7")
PART_NAMES = ("encode, append", "score, select", "gather, attend")
TITLES = {
    "latency": "One decoding step of one layer",
    "parts": "Where a step's time goes (left: the operators one by one; right: the whole step)",
    "speedup": "Speedup over the fastest dense attention of the same run",
    "crossover": "From which length a step is faster than dense attention",
    "budget": "A step's time by its budget",
    "arrivals": "Serving in vLLM, a model with dummy weights",
    "generate": "A token of a whole transformers model",
    "offload": "One layer's decoding step, keys and values in host memory",
}

GENERATE_MODEL = "llama-3.1-8b"
# (method, dense layers if they matter): label and style.
GENERATE_LINES: dict[tuple[str, str | None], tuple[str, dict[str, Any]]] = {
    ("dynamic", None): ("dense, FlashAttention, eager", {"color": "#777777", "marker": "o"}),
    ("static", None): ("dense, static cache, captured", {"color": "#CC79A7", "marker": "o"}),
    ("dense", None): ("dense by hata, captured", {"color": "#000000", "marker": "o"}),
    ("hata-eager", "2"): ("hata, eager", {"color": "#E69F00", "marker": "s", "ls": ":"}),
    ("hata", "2"): ("hata, captured, 2 dense layers", {"color": "#D55E00", "marker": "s"}),
    ("hata", "0"): ("hata, captured, none dense", {"color": "#0072B2", "marker": "s"}),
}
# (mode, similarity of neighbouring queries): label and style.
OFFLOAD_LINES: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("dense", ""): ("every position over PCIe", {"color": "#000000", "marker": "o"}),
    ("magicpig", ""): ("MagicPIG, on the CPU", {"color": "#AA7744", "marker": "o"}),
    ("mapped", ""): ("no row cache", {"color": "#777777", "marker": "s"}),
    ("staged", ""): ("gathered by the CPU, copied", {"color": "#777777", "marker": "^"}),
    ("cpu", ""): ("attended to by the CPU", {"color": "#AA7744", "marker": "s"}),
    ("row_cache", "0"): ("row cache, unlike queries", {"color": "#E69F00", "marker": "s"}),
    ("row_cache", "0.8"): ("row cache, similarity 0.8", {"color": "#D55E00", "marker": "s"}),
    ("hybrid", "0.8"): ("the same, misses by the CPU", {"color": "#D55E00", "ls": ":"}),
    ("row_cache", "1"): ("row cache, the same query", {"color": "#009E73", "marker": "s"}),
    ("resident_dense", ""): ("dense on the GPU", {"color": "#56B4E9", "marker": "o"}),
    ("resident", ""): ("hata on the GPU", {"color": "#0072B2", "marker": "o"}),
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
        "arrivals": lambda figure: draw_arrivals(figure, results, device),
        "generate": lambda figure: draw_generate(figure, results, device),
        "offload": lambda figure: draw_offload(figure, results, device),
    }
    written = []
    for name, draw in pictures.items():
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(9, 4), layout="constrained")
            if draw(figure):
                figure.suptitle(f"{TITLES[name]}: {steps[0].gpu}", fontsize=10)
                path = folder / f"{name}_{device}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else None
                with whole_file(path, "bench") as partial:
                    figure.savefig(partial, dpi=150, metadata=metadata)
                written.append(path)
    return written


def draw_latency(figure: Figure, steps: list[Step]) -> bool:
    """Time against length at batch 1, and against batch at 32K, with dense kernels and floors."""
    lengths, batches = by_heads(steps, batch=1), by_heads(steps, seq_len=32 << 10)
    panels = [(f"batch 1, {name} heads", "tokens", length, chosen) for name, chosen in lengths]
    panels += [(f"32K tokens, {name} heads", "batch", batch, chosen) for name, chosen in batches]
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
    return step.shape.seq_len


def batch(step: Step) -> int:
    return step.shape.batch


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
        (f"batch {size}, {name} heads", chosen)
        for size in (1, 8)
        for name, chosen in by_heads(steps, batch=size)
    ]
    if not any(step.speedup for _, chosen in panels for step in chosen):
        return False
    figure.set_size_inches(11, 3.6)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, chosen) in zip(grid, panels, strict=True):
        for config, color in COLORS.items():
            points = sorted((s.shape.seq_len, s.speedup) for s in chosen if s.config == config)
            if points:
                axes.plot(*zip(*points, strict=True), "-o", ms=4, color=color, label=LABELS[config])
        axes.axhline(1, color="black", lw=0.8)
        axes.set(title=title, xlabel="tokens")
        axes.set(xscale="log", yscale="log")
        log_axis(axes, sorted({step.shape.seq_len for step in chosen}))
        axes.tick_params(axis="x", labelrotation=90)
    grid[0].set(ylabel="times faster than dense")
    legend_below(figure)
    return True


def draw_budget(figure: Figure, steps: list[Step]) -> bool:
    """Time against the share of the sequence that is selected."""
    random = [step for step in steps if not step.captured]
    unusual = [s for s in random if s not in usual(random)]
    shapes = list(dict.fromkeys(step.shape for step in unusual))
    if not shapes:
        return False
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        for config, color in COLORS.items():
            points = sorted(
                (100 * s.top_k / shape.seq_len, s.us, s.floor_us)
                for s in random
                if s.shape == shape and s.config == config
            )
            if points:
                xs, times, floors = zip(*points, strict=True)
                axes.plot(xs, times, "-o", ms=4, color=color, label=LABELS[config])
                axes.plot(xs, floors, "--", lw=0.8, color=color, label=f"{config}: its bytes alone")
        axes.axvline(100 * PAPER_BUDGET, color="black", lw=0.5)
        axes.set(title=str(shape), xlabel="top_k, % of the sequence", ylabel="µs", xscale="log")
        axes.set_xticks(xs, [f"{x:.2g}" for x in xs])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    legend_below(figure)
    return True


def draw_parts(figure: Figure, steps: list[Step]) -> bool:
    """Stacked bars of the operators' times, each beside the whole step's."""
    found = table_steps(steps)
    figure.set_size_inches(11, 4.5)
    axes = figure.subplots()
    labels, x = [], 0.0
    for shape, chosen in found.items():
        first = x
        for config, step in chosen.items():
            bottom = 0.0
            for part, color in zip(PARTS, PART_COLORS, strict=True):
                axes.bar(x, step.parts[part], 0.4, bottom, color=color)
                bottom += step.parts[part]
            axes.bar(x + 0.4, step.us, 0.4, color=COLORS[config])
            axes.text(x + 0.2, max(bottom, step.us), config, ha="center", va="bottom", fontsize=8)
            x += 1
        labels.append(((first + x - 1) / 2 + 0.2, str(shape)))
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
        shape_of(row): float(row["dense_us"]) / float(row["step_us"])
        for row in rows
        if row["dense_us"]
    }
    paper = {
        shape_of(row): float(row["dense_layer_ms"]) / float(row["hata_layer_ms"])
        for row in read(results / "paper_figure5.csv")
    }
    figure.set_size_inches(11, 4.5)
    axes = figure.subplots()
    for i, (shape, chosen) in enumerate(found.items()):
        bars = [("authors", authors.get(shape), "#999999")]
        bars += [(name, step.speedup, COLORS[name]) for name, step in chosen.items()]
        for j, (_, value, color) in enumerate(bars):
            if value is not None:
                place = i + 0.2 * (j - 1.5)
                axes.bar(place, value, 0.2, color=color)
                axes.text(place, value, f"{value:.3g}", ha="center", va="bottom", fontsize=7)
        if shape in paper:
            axes.plot(i, paper[shape], "D", color="white", mec="black", ms=5)
    if authors:
        axes.bar(0, 0, color="#999999", label="the authors' kernels, A, on the same card")
    for config, color in COLORS.items():
        axes.bar(0, 0, color=color, label=f"hata, {LABELS[config]}")
    label = "the paper's figure 5: a whole layer, on its card"
    axes.plot([], [], "D", color="white", mec="black", ms=5, label=label)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(found)), [str(shape) for shape in found], rotation=15)
    axes.set(ylabel="times faster than dense")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left")
    return any(step.speedup for chosen in found.values() for step in chosen.values())


def draw_arrivals(figure: Figure, results: Path, device: str) -> bool:
    """Throughput against the median time per token, at each rate of arrival."""
    file = results / f"vllm_arrivals_{device}.csv"
    if not file.is_file():
        return False
    rows = read(file)
    panels = sorted({row["documents"] for row in rows}, key=int)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, documents in zip(grid, panels, strict=True):
        chosen = [row for row in rows if row["documents"] == documents]
        backends = dict.fromkeys(row["backend"] for row in chosen)
        colors = dict(zip(backends, DENSE_COLORS, strict=False)) | {"hata": COLORS["B"]}
        for backend in backends:
            rates, xs, ys = zip(
                *sorted(
                    (float(row["rate"]), float(row["tpot_p50_ms"]), float(row["tokens_per_s"]))
                    for row in chosen
                    if row["backend"] == backend
                ),
                strict=True,
            )
            axes.plot(xs, ys, "-o", ms=4, color=colors[backend], label=backend)
            for rate, *place in zip(rates, xs, ys, strict=True):
                text = {"fontsize": 7, "xytext": (4, 4), "textcoords": "offset points"}
                axes.annotate(f"{rate:g}/s", place, color=colors[backend], **text)
        kind = f"{documents} prompts in the prefix cache" if int(documents) else "new prompts"
        axes.set(title=kind, xlabel="median time per output token, ms", ylabel="output tokens/s")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    legend_below(figure)
    return True


def draw_generate(figure: Figure, results: Path, device: str) -> bool:
    """Time per token against the context, one panel per batch that has several contexts."""
    file = results / f"generate_{device}.csv"
    rows = [row for row in read(file) if row["model"] == GENERATE_MODEL] if file.is_file() else []
    contexts: dict[str, set[int]] = {}
    for row in rows:
        contexts.setdefault(row["batch"], set()).add(int(row["context"]))
    panels = [size for size, found in contexts.items() if len(found) > 1]
    if not panels:
        return False
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, size in zip(grid, panels, strict=True):
        for (method, dense_layers), (label, style) in GENERATE_LINES.items():
            points = sorted(
                (int(row["context"]), float(row["ms_per_token"]))
                for row in rows
                if (row["batch"], row["method"]) == (size, method)
                and dense_layers in (None, row["dense_layers"])
            )
            if points:
                axes.plot(*zip(*points, strict=True), ms=4, label=label, **style)
        axes.set(title=f"batch {size}", xlabel="tokens of context", xscale="log", yscale="log")
        log_axis(axes, sorted(contexts[size]))
    grid[0].set(ylabel="ms per token")
    legend_below(figure, columns=3)
    return True


def draw_offload(figure: Figure, results: Path, device: str) -> bool:
    """Time against the context at batch 1, and what the selected rows take over PCIe alone."""
    file = results / f"offload_{device}.csv"
    rows = [row for row in read(file) if row["batch"] == "1"] if file.is_file() else []
    if not rows:
        return False
    figure.set_size_inches(9, 5)
    axes = figure.subplots()
    for (mode, similarity), (label, style) in OFFLOAD_LINES.items():
        chosen = [row for row in rows if (row["mode"], row["similarity"]) == (mode, similarity)]
        points = sorted((int(row["seq_len"]), float(row["us"])) for row in chosen)
        if points:
            axes.plot(*zip(*points, strict=True), ms=4, label=label, **style)
    floors = sorted(
        (int(row["seq_len"]), float(row["pcie_floor_us"]))
        for row in rows
        if row["mode"] == "mapped"
    )
    label = "the selected rows' bytes alone"
    axes.plot(*zip(*floors, strict=True), "--", color="#777777", lw=0.8, label=label)
    axes.set(xlabel="tokens of context", ylabel="µs", xscale="log", yscale="log")
    log_axis(axes, sorted({int(row["seq_len"]) for row in rows}))
    legend_below(figure, columns=3)
    return True


def log_axis(axes: Axes, values: list[int]) -> None:
    """Labels a logarithmic x axis with the values themselves: 1, 8, 512, 128K."""
    axes.set_xticks(values)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(round(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)


def legend_below(figure: Figure, columns: int = 4) -> None:
    """Adds one legend of all panels' lines, each label once."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
