"""What the pictures of the results have in common: colours, labels, axes."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .cases import CONFIGS, tokens

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


def log_axis(axes: Axes, values: list[int]) -> None:
    """Labels a logarithmic x axis with the values themselves: 1, 8, 512, 128K."""
    axes.set_xticks(values)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(round(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)


def legend_below(figure: Figure) -> None:
    """Adds one legend of all panels' lines, each label once."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
