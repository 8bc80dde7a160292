"""The pictures of ``hata eval``'s report."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.ticker import ScalarFormatter

from hata.eval.prose import WHERE
from hata.eval.report import distinct, label, select
from hata.eval.rows import Row
from hata.eval.tasks import AT_DEPTHS, LIKELIHOOD
from hata.pictures import picture

_MARKERS = "osv^D*Pp"
_FIGURES = {"kl": "KL(dense || sparse), nats", "nll_excess": "excess NLL, nats"}
_AXES = {"bytes_read": "bytes read per cached position and KV head", "top_k": "top_k"}


def plot_all(folder: Path, number: int, rows: Sequence[Row]) -> list[Path]:
    """Draws what a run's rows allow.

    Args:
        folder: Where to write.
        number: Of the run, in the files' names.
        rows: Of one model, on the same texts.

    Returns:
        The PNG files.
    """
    drawn = []
    plain = [row for row in select(rows, task=LIKELIHOOD) if row["method"] != "dense"]
    for context, dense_layers in distinct(plain, "context", "dense_layers"):
        path = folder / f"likelihood_{number}_{context}_{dense_layers}_dense_layers.png"
        plot_likelihood(path, select(plain, context=context, dense_layers=dense_layers))
        drawn.append(path)
    needles = select(rows, task=AT_DEPTHS)
    if needles:
        path = folder / f"needle_{number}.png"
        plot_needles(path, needles)
        drawn.append(path)
    return drawn


def plot_likelihood(path: Path, rows: Sequence[Row]) -> None:
    """Draws KL and excess NLL against bytes read and against the budget.

    Args:
        path: The PNG file to write.
        rows: Of one context and one number of dense layers.
    """
    tab20 = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    colors = [*tab20[::2], *tab20[1::2]]  # the strong ones first
    first = rows[0]
    with picture(path, WHERE, 13, 8) as figure:
        grid = figure.subplots(2, 2, sharey="row", sharex="col")
        for axes_of_row, (column, said) in zip(grid, _FIGURES.items(), strict=True):
            for axes, along in zip(axes_of_row, _AXES, strict=True):
                for i, name in enumerate(dict.fromkeys(map(label, rows))):
                    points = [row for row in rows if label(row) == name]
                    axes.plot(
                        [float(row[along]) for row in points],
                        [float(row[column]) for row in points],
                        color="black" if name == "exact: softmax" else colors[i % len(colors)],
                        marker=_MARKERS[i % len(_MARKERS)],
                        markersize=4,
                        linewidth=1.2,
                        label=name,
                    )
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.grid(alpha=0.3)
            axes_of_row[0].set_ylabel(said)
            if column == "kl":
                axes_of_row[0].set_yscale("log")
            else:
                axes_of_row[0].axhline(0.0, color="black", linewidth=0.5)
        for axes, said in zip(grid[1], _AXES.values(), strict=True):
            axes.set_xlabel(said)
        figure.suptitle(
            f"{first['model']}, {first['context']} tokens, {first['dense_layers']} dense layers"
        )
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper")


def plot_needles(path: Path, rows: Sequence[Row]) -> None:
    """Draws how often a single needle is found, over depth and context, for each method.

    Args:
        path: The PNG file to write.
        rows: Of `AT_DEPTHS`; of each method and context the smallest budget is drawn, with the
            fewest dense layers.
    """
    methods = list(dict.fromkeys(map(label, rows)))
    contexts = sorted({int(row["context"]) for row in rows})
    depths = sorted({float(row["depth"]) for row in rows})
    columns = min(4, len(methods))
    lines = -(-len(methods) // columns)
    height = 0.7 + lines * (0.9 + 0.3 * len(contexts))
    with picture(path, WHERE, 1 + 3 * columns, height) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, method in zip(grid, methods, strict=False):
            found = torch.full((len(contexts), len(depths)), torch.nan)
            of_method = [row for row in rows if label(row) == method]
            # The largest budget comes first, so that the smallest one stays.
            of_method.sort(key=lambda x: (-int(x["top_k"] or 0), -int(x["dense_layers"] or 0)))
            for row in of_method:
                place = contexts.index(int(row["context"])), depths.index(float(row["depth"]))
                found[place] = float(row["score"])
            image = axes.imshow(found.numpy(), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axes.set_title(method, fontsize=8)
            axes.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
            axes.set_yticks(range(len(contexts)), [str(context) for context in contexts])
        for axes in grid[len(methods) :]:
            axes.set_visible(False)
        figure.supxlabel("depth of the needle")
        figure.supylabel("context")
        figure.colorbar(image, ax=list(grid))
        figure.suptitle(f"{rows[0]['model']}: needles found at the smallest budget")
