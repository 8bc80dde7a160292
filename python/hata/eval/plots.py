"""The pictures of ``hata eval``'s report."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from hata.eval.prose import WHERE
from hata.eval.report import counts, distinct, label, mean_score, select
from hata.eval.rows import Row
from hata.eval.tasks import AT_DEPTHS, LIKELIHOOD
from hata.pictures import picture

_MARKERS = "osv^D*Pp"
_BYTES, _BUDGET = "bytes read per cached position and KV head", "top_k"


@dataclass(frozen=True)
class _Point:
    """What a method gives at one budget.

    Attributes:
        bytes_read: Of a step.
        top_k: The budget.
        value: The figure.
        error: Its standard error; None where there is one sample.
    """

    bytes_read: float
    top_k: float
    value: float
    error: float | None


@dataclass(frozen=True)
class _Panel:
    """A figure of all methods.

    Attributes:
        said: Its name.
        curves: The points of each method.
        scale: Of its axis.
        line: Where dense attention lies, or None.
        of: What it is a mean over.
    """

    said: str
    curves: dict[str, list[_Point]]
    scale: str
    line: float | None
    of: str = ""


def plot_run(folder: Path, number: int, rows: Sequence[Row]) -> list[Path]:
    """Draws likelihood and answers, as far as a run's rows allow it.

    Args:
        folder: Where to write.
        number: Of the run, in the files' names.
        rows: Of one model, on the same texts.

    Returns:
        The PNG files.
    """
    drawn = []
    sparse = [row for row in rows if row["method"] != "dense"]
    for context, dense_layers in distinct(sparse, "context", "dense_layers"):
        some = select(sparse, context=context, dense_layers=dense_layers)
        dense = select(rows, context=context, method="dense")
        panels = {"likelihood": _likelihood(some), "answers": _answers(some, dense)}
        for name, found in panels.items():
            if found:
                path = folder / f"{name}_{number}_{context}_{dense_layers}_dense_layers.png"
                title = f"{rows[0]['model']}, {context} tokens, {dense_layers} dense layers"
                plot_panels(path, title, found)
                drawn.append(path)
    return drawn


def _curves(
    rows: Sequence[Row], measured: Callable[[list[Row]], tuple[float, float | None] | None]
) -> dict[str, list[_Point]]:
    """Returns each method's points by budget, those that ``measured`` makes of a setting's rows."""
    curves: dict[str, list[_Point]] = {}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((label(row), row["bytes_read"], row["top_k"]), []).append(row)
    for (name, bytes_read, top_k), group in groups.items():
        found = measured(group)
        if found is not None:
            point = _Point(float(bytes_read), float(top_k), *found)
            curves.setdefault(name, []).append(point)
    return {name: sorted(points, key=lambda x: x.top_k) for name, points in curves.items()}


def _likelihood(rows: Sequence[Row]) -> list[_Panel]:
    """KL and excess NLL of plain text."""
    plain = select(rows, task=LIKELIHOOD)
    if not plain:
        return []

    def curves(value: str, error: str) -> dict[str, list[_Point]]:
        return _curves(
            plain, lambda x: (float(x[0][value]), float(x[0][error]) if x[0][error] else None)
        )

    return [
        _Panel("KL(dense || sparse), nats", curves("kl", "kl_stderr"), "log", None),
        _Panel("excess NLL, nats", curves("nll_excess", "nll_stderr"), "linear", 0.0),
    ]


def _answers(rows: Sequence[Row], dense: Sequence[Row]) -> list[_Panel]:
    """The score of the settings that have all tasks that count, mean over these tasks."""
    tasks = [task for (task,) in distinct(dense, "task") if task != LIKELIHOOD]
    tasks = [task for task in tasks if counts(task, select(dense, task=task))]

    def mean(group: Sequence[Row]) -> tuple[float, float | None] | None:
        of_task = [select(group, task=task) for task in tasks]
        if not all(of_task):
            return None
        scores, errors = zip(*map(mean_score, of_task), strict=True)
        error = None if None in errors else math.hypot(*errors) / len(tasks)
        return statistics.fmean(scores), error

    curves = _curves(rows, mean) if tasks else {}
    if not curves:
        return []
    found = mean(dense)
    line = None if found is None else found[0]
    return [_Panel("share of right answers", curves, "linear", line, ", ".join(tasks))]


def plot_panels(path: Path, title: str, panels: Sequence[_Panel]) -> None:
    """Draws figures against bytes read and against the budget, with standard errors.

    Args:
        path: The PNG file to write.
        title: Of the picture.
        panels: The figures, one below the other; of the same methods.
    """
    tab20 = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    colors = [*tab20[::2], *tab20[1::2]]  # the strong ones first
    with picture(path, WHERE, 13, 1 + 4 * len(panels)) as figure:
        shape = (len(panels), 2)
        grid = figure.subplots(*shape, sharey="row", sharex="col", squeeze=False)
        for line, panel in zip(grid, panels, strict=True):
            for axes, along in zip(line, ("bytes_read", "top_k"), strict=True):
                for i, (name, points) in enumerate(panel.curves.items()):
                    axes.errorbar(
                        [getattr(point, along) for point in points],
                        [point.value for point in points],
                        [point.error or 0.0 for point in points],
                        color="black" if name == "exact: softmax" else colors[i % len(colors)],
                        marker=_MARKERS[i % len(_MARKERS)],
                        markersize=4,
                        linewidth=1.2,
                        elinewidth=0.5,
                        label=name,
                    )
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.grid(alpha=0.3)
                if panel.line is not None:
                    axes.axhline(panel.line, color="black", linewidth=0.8, linestyle=":")
            line[0].set_yscale(panel.scale)
            line[0].set_ylabel(panel.said)
            line[0].set_title(panel.of, fontsize=7, loc="left")
        for axes, said in zip(grid[-1], (_BYTES, _BUDGET), strict=True):
            axes.set_xlabel(said)
        figure.suptitle(title)
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper")


def plot_needles(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draws how often each method finds a single needle, over depth and context.

    Args:
        folder: Where to write.
        rows: Of any tasks and runs; those of `AT_DEPTHS` are drawn, of a model, dtype and texts
            together.

    Returns:
        The PNG files.
    """
    needles = select(rows, task=AT_DEPTHS)
    names = ("model", "dtype", "texts")
    drawn = []
    for number, values in enumerate(distinct(needles, *names)):
        drawn.append(folder / f"needle_{number}.png")
        _plot_needles(drawn[-1], select(needles, **dict(zip(names, values, strict=True))))
    return drawn


def _plot_needles(path: Path, rows: Sequence[Row]) -> None:
    """Draws the smallest budget of each method and context, with the fewest dense layers."""
    methods = list(dict.fromkeys(map(label, rows)))
    contexts = sorted({int(row["context"]) for row in rows})
    depths = sorted({float(row["depth"]) for row in rows})
    columns = min(4, len(methods))
    lines = -(-len(methods) // columns)
    height = 0.7 + lines * (0.7 + 0.3 * len(contexts))
    budgets: dict[int, int] = {}
    with picture(path, WHERE, 1 + 3 * columns, height) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, method in zip(grid, methods, strict=False):
            found = torch.full((len(contexts), len(depths)), torch.nan)
            of_method = [row for row in rows if label(row) == method]
            # The largest budget comes first, so that the smallest one stays.
            of_method.sort(key=lambda x: (-int(x["top_k"] or 0), -int(x["dense_layers"] or 0)))
            for row in of_method:
                context = int(row["context"])
                place = contexts.index(context), depths.index(float(row["depth"]))
                found[place] = float(row["score"])
                if row["top_k"]:
                    budgets[context] = min(int(row["top_k"]), budgets.get(context, 2**31))
            _heat_map(axes, found)
            axes.set_title(method, fontsize=8)
            axes.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
            axes.set_yticks(range(len(contexts)), [str(context) for context in contexts])
        for axes in grid[len(methods) :]:
            axes.set_visible(False)
        figure.supxlabel("depth of the needle")
        figure.supylabel("context")
        at = ", ".join(f"{budgets[x]} at {x} tokens" for x in contexts if x in budgets)
        figure.suptitle(f"{rows[0]['model']}: share of needles found, top_k {at}")


def _heat_map(axes: Axes, found: torch.Tensor) -> None:
    """Colours shares between 0 and 1, and writes them down."""
    axes.imshow(found.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for line, column in (~found.isnan()).nonzero().tolist():
        share = float(found[line, column])
        color = "black" if share > 0.6 else "white"
        axes.text(column, line, f"{share:.2g}", ha="center", va="center", color=color, size=7)
