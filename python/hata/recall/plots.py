"""Measurements as pictures."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from hata.pictures import picture
from hata.recall.frontier import Frontier
from hata.recall.measure import Measurement, Results
from hata.recall.options import WHERE
from hata.recall.report import Levels
from hata.selectors import HataSelector
from hata.training.captures import CaptureInfo

_STYLES = {
    "exact": ("black", "-"),
    "loki": ("tab:green", "--"),
    "quest": ("tab:orange", "-."),
    "sparq": ("tab:purple", ":"),
    "streaming": ("silver", "--"),
    "h2o": ("slategray", "-."),
    "snapkv": ("peru", "-."),
    "vattention": ("darkcyan", ":"),
    "magicpig": ("hotpink", "-."),
    "rabitq": ("goldenrod", "--"),
    "hashattention": ("saddlebrown", "--"),
}
_UNTRAINED = "random"
_TRAINED = ("tab:blue", "tab:red", "tab:cyan", "tab:pink", "tab:olive", "tab:brown")
_MARKERS = "osv^D*"


def plot_budgets(path: Path, results: Results) -> None:
    """Draws the attention mass that every selector loses, over the budget, into a PNG file."""
    info = results.info
    with picture(path, WHERE, 9, 5) as figure:
        axes = figure.subplots()
        shares = [100 * budget / info.seq_len for budget in results.budgets]
        seen: dict[str, int] = {}
        for measurement in results.measurements:
            selector, family = measurement.selector, _family(measurement)
            nth = seen[family] = seen.get(family, -1) + 1
            color, line = _style(family, list(seen))
            axes.plot(
                shares,
                results.lost(measurement),
                color=color,
                linestyle=line,
                marker=_MARKERS[nth % len(_MARKERS)],
                markersize=4,
                linewidth=1.2,
                label=f"{selector.name}: {selector.variant}"
                f" ({selector.bytes_per_token(info.head_dim):g} B)",
            )
        axes.set_xscale("log")
        axes.set_xticks(shares, [f"{share:.2g}" for share in shares])
        _loss_axis(axes)
        axes.set(xlabel="budget, % of the context", title=f"{info.model}, {info.seq_len} tokens")
        title = "selector (bytes read per token and KV head)"
        figure.legend(title=title, loc="outside right upper")


def plot_bits(path: Path, results: Results) -> None:
    """Draws the attention mass that codes lose over num_bits, as the paper's figure 8 does.

    Args:
        path: The PNG file to write.
        results: What was measured; selectors without codes are horizontal lines.
    """
    shown = results.shown
    curves: dict[str, list[tuple[int, float]]] = {}
    drawn: set[str] = set()
    with picture(path, WHERE, 9, 4.5) as figure:
        axes = figure.subplots()
        for measurement in results.measurements:
            selector, lost = measurement.selector, results.lost(measurement)[shown]
            if isinstance(selector, HataSelector):
                curves.setdefault(_family(measurement), []).append((selector.num_bits, lost))
                continue
            color, line = _style(selector.name, [])
            width = 0.8 if selector.name in drawn else 1.6
            drawn.add(selector.name)
            label = f"{selector.name}: {selector.variant}"
            axes.axhline(lost, color=color, linestyle=line, linewidth=width, label=label)
        for family, points in curves.items():
            color, line = _style(family, list(curves))
            bits, lost_at = zip(*sorted(points), strict=True)
            axes.plot(bits, lost_at, color=color, linestyle=line, marker="o", label=family)
        ticks = sorted({bits for points in curves.values() for bits, _ in points})
        axes.set_xticks(ticks, [str(bits) for bits in ticks])
        _loss_axis(axes)
        axes.set(xlabel="num_bits", title=_title(results))
        figure.legend(loc="outside right upper")


def plot_heat_map(path: Path, results: Results) -> None:
    """Draws the attention mass that codes lose beyond exact top-k, for every layer and KV head.

    Args:
        path: The PNG file to write.
        results: What was measured, the exact selector first; learned codes are drawn, or, without
            any, random ones.
    """
    info = results.info
    exact = results.mass_of_heads(results.measurements[0])
    codes = [x for x in results.measurements if isinstance(x.selector, HataSelector)]
    drawn = [x for x in codes if not _family(x).startswith(_UNTRAINED)] or codes
    excess = [exact - results.mass_of_heads(measurement) for measurement in drawn]
    highest = max(float(x.max()) for x in excess)
    height = 0.8 + 0.16 * info.num_kv_heads
    with picture(path, WHERE, 9, 0.8 + height * len(drawn)) as figure:
        grid = figure.subplots(len(drawn), squeeze=False, sharex=True)[:, 0]
        for axes, measurement, values in zip(grid, drawn, excess, strict=True):
            image = axes.imshow(
                values.T.numpy(), vmin=0, vmax=highest, cmap="magma_r", aspect="auto"
            )
            axes.set_title(measurement.selector.variant, fontsize=9)
            axes.set(ylabel="KV head", yticks=range(info.num_kv_heads))
        ticks = range(0, info.num_layers, 2)
        grid[-1].set_xticks(ticks, [str(info.layers[i]) for i in ticks])
        grid[-1].set(xlabel="layer")
        figure.colorbar(image, ax=list(grid))
        figure.suptitle(f"Attention mass lost beyond exact top-k: {_title(results)}")


def plot_frontier(path: Path, info: CaptureInfo, frontier: Frontier, levels: Levels) -> None:
    """Draws the attention mass that pairs of num_bits and top_k lose, over the bytes they read."""
    with picture(path, WHERE, 8, 5) as figure:
        axes = figure.subplots()
        for num_bits in sorted({pair.num_bits for pair in frontier.pairs}):
            found = [frontier.everywhere(x) for x in frontier.pairs if x.num_bits == num_bits]
            lost = [1 - x.attention_mass for x in found]
            kib = [x.bytes_per_step / 1024 for x in found]
            axes.plot(kib, lost, marker="o", markersize=4, label=f"{num_bits} bits")
        kib = [own.bytes_per_step / 1024 for _, own in levels]
        lost = [1 - own.attention_mass for _, own in levels]
        axes.plot(kib, lost, color="black", linestyle="--", label="each layer its own pair")
        axes.set_xscale("log")
        ticks = [2**n for n in range(20) if min(kib) <= 2**n <= max(kib)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        _loss_axis(axes)
        label = "KiB read per step, layer and KV head: all codes, selected keys and values"
        axes.set(xlabel=label, title=f"{info.model}, {info.seq_len} tokens")
        axes.legend()


def _loss_axis(axes: Axes) -> None:
    axes.set(yscale="log", ylabel="attention mass lost")
    low, high = axes.get_ylim()
    steps = [digit * 10.0**power for power in range(-6, 1) for digit in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in steps if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _title(results: Results) -> str:
    info = results.info
    return f"{info.model}, {info.seq_len} tokens, top_k {results.budgets[results.shown]}"


def _family(measurement: Measurement) -> str:
    """The name of a selector, or the recipe, query bits and norms of codes."""
    selector = measurement.selector
    if not isinstance(selector, HataSelector):
        return selector.name
    norms = ", norms" if selector.weights.key_norms else ""
    return f"{selector.recipe}, query {selector.weights.query_bits}{norms}"


def _style(family: str, families: Sequence[str]) -> tuple[str, str]:
    if family in _STYLES:
        return _STYLES[family]
    if family.startswith(_UNTRAINED):
        return "tab:gray", "--" if "norms" in family else "-"
    learned = [x for x in families if x not in _STYLES and not x.startswith(_UNTRAINED)]
    return _TRAINED[learned.index(family) % len(_TRAINED)], "-"
