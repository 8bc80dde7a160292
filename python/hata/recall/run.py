"""``hata recall`` from options to printed results, files and pictures."""

import shlex
import sys
from collections.abc import Sequence

from rich.console import Console
from torch import Tensor

from hata.checks import check
from hata.progress import progress_bar
from hata.provenance import origin
from hata.recall.frontier import Frontier
from hata.recall.lineup import SelectedLayers, baseline_selectors, trained_selectors
from hata.recall.measure import Measurement, Results, measure
from hata.recall.options import WHERE, RecallOptions
from hata.recall.report import (
    HEAD_COLUMNS,
    MEAN_COLUMNS,
    head_rows,
    mean_rows,
    print_frontier,
    print_layers,
    print_means,
    print_sharings,
    write_frontier,
    write_rows,
    write_sharings,
)
from hata.recall.sharing import Sharing, measured_on, shared_mass, sharings
from hata.selectors import ExactSelector, Selector
from hata.training.captures import Captures

_FILE_WIDTH = 300  # where the output is not a terminal: no table is wider


def run_recall(options: RecallOptions) -> Results:
    """Measures, prints and writes what the options ask for.

    Args:
        options: What to do.

    Returns:
        What was measured on the held-out captures.

    Raises:
        ValueError: An option does not fit the captures, or a file is not what it should be.
    """
    captures = Captures.open(options.captures)
    info = captures.info
    dense = options.num_dense_layers
    rule = f"leave one of the captured layers, {list(info.layers)}"
    check(dense <= info.layers[-1], WHERE, "--num-dense-layers", rule, dense)
    budgets = options.budgets(info.seq_len)
    calibration = None if options.calibration is None else Captures.open(options.calibration)
    shape = SelectedLayers(len(info.layer_types), info.layers, info.num_kv_heads, info.head_dim)
    trained = trained_selectors(shape, options)
    device = options.torch_device()
    others: list[Selector] = []
    if options.baselines:
        baselines = baseline_selectors(shape, calibration, options, device, trained)
        others = [x for x in baselines if not x.foresees]  # captures have no layer's input
    selectors = [ExactSelector(), *others, *trained]
    options.make_folders()

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    measurements = _measure(captures, selectors, options, "held-out text")
    results = Results(info, measurements, budgets, dense)
    print_means(console, results)
    codes = [x for x in measurements if x.selector.name in ("exact", "hata")]
    print_layers(console, results.only(codes))

    made = origin(device, shlex.join(["hata", *sys.argv[1:]]))
    if options.csv is not None:
        write_rows(options.csv, MEAN_COLUMNS, mean_rows(results), made)
    if options.per_head is not None:
        write_rows(options.per_head, HEAD_COLUMNS, head_rows(results), made)
    levels = None
    if options.frontier is not None:
        frontier = chosen_on = Frontier(results.only(measurements[-len(trained) :]))
        if calibration is not None:
            found = _measure(calibration, trained, options, "calibration text")
            chosen_on = Frontier(results.only(found))
        levels = frontier.levels(chosen_on)
        print_frontier(console, levels)
        write_frontier(options.frontier, results, levels, made)
    if options.share_selection is not None:
        shared = _shared(captures, calibration, trained[0], results, options)
        print_sharings(console, results, shared)
        write_sharings(options.share_selection, results, shared, made)
    if options.plot is not None:
        from hata.recall import plots  # matplotlib is an extra

        plots.plot_budgets(options.plot / "budgets.png", results)
        plots.plot_bits(options.plot / "num_bits.png", results)
        plots.plot_heat_map(options.plot / "heat_map.png", results)
        if levels is not None:
            plots.plot_frontier(options.plot / "frontier.png", info, frontier, levels)
    return results


def _shared(
    captures: Captures,
    calibration: Captures | None,
    selector: Selector,
    results: Results,
    options: RecallOptions,
) -> list[Sharing]:
    """Chooses the layers that select, on the calibration text where there is one."""
    top_k, first = results.budgets[results.shown], results.first_sparse

    def measured(captures: Captures, text: str) -> Tensor:
        num_layers = captures.info.num_layers - first
        with progress_bar(f"{text}: shared selections", num_layers) as on_layer:
            return shared_mass(captures, selector, top_k, first, options, on_layer)

    mass = measured(captures, "held-out text")
    chosen_on = mass if calibration is None else measured(calibration, "calibration text")
    return measured_on(mass, sharings(chosen_on))


def _measure(
    captures: Captures, selectors: Sequence[Selector], options: RecallOptions, text: str
) -> list[Measurement]:
    with progress_bar(f"{text}: layers", captures.info.num_layers) as on_layer:
        return measure(captures, selectors, options, on_layer)
