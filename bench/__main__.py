"""The command ``python -m bench``: each operator alone, and the whole decoding step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from hata.checks import check
from hata.cli import run_app
from hata.provenance import origin

from . import decode, ops, variants
from .baselines import Baselines
from .capture import capture
from .cases import CONFIGS
from .grids import GRIDS, plan_for
from .inputs import Captured
from .options import (
    AppendOption,
    BaselinesOption,
    CodesOption,
    DeviceOption,
    FileOption,
    FolderOption,
    GridOption,
    InputsOption,
    MemoryOption,
    OpOption,
    Options,
    QuickOption,
    ResultsDeviceOption,
    ResultsOption,
    ShapeOption,
    check_output,
    check_rows,
    checked_device,
    checked_memory_limit,
    checked_names,
)
from .report import RESULTS, ROOT, Report, slug
from .run import Run
from .tables import all_tables
from .timing import Timer, measure_bandwidth
from .vllm import measure_vllm

app = typer.Typer(
    help="Measures each operator and the whole decoding step against what their bytes allow.",
    rich_markup_mode=None,
)


@dataclass(frozen=True)
class Bench:
    """One of the benchmarks: what runs, and the columns of its file and of its table."""

    title: str
    run: Callable[[Run, Report, Progress], None]
    columns: Sequence[str]
    shown: dict[str, str]


BENCHES = {
    "ops": Bench("Operators alone", ops.bench_ops, ops.COLUMNS, ops.SHOWN),
    "decode": Bench(
        "Decoding step of one layer", decode.bench_decode, decode.COLUMNS, decode.SHOWN
    ),
    "variants": Bench(
        "Unusual settings", variants.bench_variants, variants.COLUMNS, variants.SHOWN
    ),
}
BUDGET_S = {"cuda": 0.03, "cpu": 0.5}  # of one measurement
QUICK_BUDGET_S = 0.01
BANDWIDTH_BYTES = (2 << 30) - (1 << 20)  # PyTorch sums up to 2 GiB in one kernel
QUICK_BANDWIDTH_BYTES = 128 << 20


@app.callback(invoke_without_command=True)
def default(
    ctx: typer.Context,
    device: DeviceOption = None,
    quick: QuickOption = False,
    output: FolderOption = None,
    append: AppendOption = False,
    memory_limit_gb: MemoryOption = None,
) -> None:
    """Measures each operator and the whole decoding step; without a subcommand, everything."""
    options = Options(device, quick, output, append, memory_limit_gb)
    if ctx.invoked_subcommand is None:
        measure("all", list(BENCHES), options)
    elif options != Options():
        rule = f"follow the subcommand {ctx.invoked_subcommand}"
        check(False, "bench", "options", rule, "some before it")


@app.command("ops")
def measure_ops(
    device: DeviceOption = None,
    quick: QuickOption = False,
    output: FileOption = None,
    append: AppendOption = False,
    memory_limit_gb: MemoryOption = None,
    op: OpOption = None,
    shape: ShapeOption = None,
    baselines: BaselinesOption = Baselines.ALL,
    inputs: InputsOption = None,
) -> None:
    """Measures each operator alone, against generic ways to do the same."""
    options = Options(device, quick, output, append, memory_limit_gb)
    chosen = dict(baselines=baselines, inputs=inputs, ops=op or (), shapes=shape or ())
    measure("ops", ["ops"], replace(options, **chosen))


@app.command("decode")
def measure_decode(
    device: DeviceOption = None,
    quick: QuickOption = False,
    output: FileOption = None,
    append: AppendOption = False,
    memory_limit_gb: MemoryOption = None,
    grid: GridOption = None,
    shape: ShapeOption = None,
    codes: CodesOption = None,
    baselines: BaselinesOption = Baselines.ALL,
    inputs: InputsOption = None,
) -> None:
    """Measures the whole decoding step against dense attention."""
    options = Options(device, quick, output, append, memory_limit_gb)
    chosen = dict(grids=grid or (), shapes=shape or (), codes=codes or ())
    measure("decode", ["decode"], replace(options, **chosen, baselines=baselines, inputs=inputs))


@app.command("variants")
def measure_variants(
    device: DeviceOption = None,
    quick: QuickOption = False,
    output: FileOption = None,
    append: AppendOption = False,
    memory_limit_gb: MemoryOption = None,
) -> None:
    """Measures unusual settings of the step against what their bytes predict."""
    measure("variants", ["variants"], Options(device, quick, output, append, memory_limit_gb))


@app.command("all")
def measure_all(
    device: DeviceOption = None,
    quick: QuickOption = False,
    output: FolderOption = None,
    append: AppendOption = False,
    memory_limit_gb: MemoryOption = None,
    grid: GridOption = None,
    baselines: BaselinesOption = Baselines.ALL,
) -> None:
    """Measures the operators, the step and its variants in one run."""
    options = Options(device, quick, output, append, memory_limit_gb, grid or (), baselines)
    measure("all", list(BENCHES), options)


@app.command("capture")
def capture_inputs(
    output: Annotated[Path, typer.Option("--output", help="The safetensors file to write.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Local transformers folder; by default SmolLM2-135M-Instruct."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the text.")] = 4096,
    layer: Annotated[int, typer.Option(help="Which layer, from 0.")] = 14,
) -> None:
    """Writes a real layer's queries and keys to a file for --inputs; half a minute on a CPU."""
    check_output(output)
    capture(output, model, tokens, layer)
    print(f"{tokens} tokens of layer {layer} in {output}")


@app.command("plot")
def plot_results(
    device: ResultsDeviceOption = "h100",
    results: ResultsOption = RESULTS,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the pictures; by default docs/plots.")
    ] = ROOT / "docs" / "plots",
    png: Annotated[bool, typer.Option("--png", help="PNG instead of SVG.")] = False,
) -> None:
    """Draws the results as pictures; those whose rows are missing are left out."""
    check_rows(results, device)
    check_output(output / "picture")
    check(find_spec("matplotlib") is not None, "bench", "matplotlib", "be installed", "none")
    from .plot import plot_all

    for path in plot_all(results, device, output, "png" if png else "svg"):
        print(path)


@app.command("tables")
def print_tables(device: ResultsDeviceOption = "h100", results: ResultsOption = RESULTS) -> None:
    """Prints the results as Markdown tables."""
    check_rows(results, device)
    print(all_tables(results, device))


app.command("vllm")(measure_vllm)


def measure(command: str, names: list[str], options: Options) -> None:
    """Runs the benchmarks ``names``; several write into the folder ``output``, one to the file."""
    device = checked_device(options.device)
    grids = checked_names("--grid", options.grids, GRIDS, default=("table",))
    chosen_ops = checked_names("--op", options.ops, ops.OPS, default=ops.OPS)
    codes = checked_names("--codes", options.codes, [config.name for config in CONFIGS], ())
    plan = plan_for(device, grids, options.quick).only(options.shapes, codes)
    memory_limit = checked_memory_limit(options.memory_limit_gb, device)
    captured = Captured.load(options.inputs) if options.inputs else None
    quick = options.quick
    files = {name: f"{name}_{slug(device)}{'_quick' * quick}.csv" for name in names}
    if command == "all":
        paths = {name: (options.output or RESULTS) / file for name, file in files.items()}
    else:
        paths = {name: options.output or RESULTS / file for name, file in files.items()}
    for path in paths.values():
        check_output(path)
    words = ["python -m bench", command, f"--device {device.type}", *options.words()]
    common = origin(device, " ".join(words))
    reports = {
        name: Report(path, BENCHES[name].columns, common, options.append)
        for name, path in paths.items()
    }

    timer = Timer(device, QUICK_BUDGET_S if quick else BUDGET_S[device.type], cold=not quick)
    bandwidth = measure_bandwidth(timer, QUICK_BANDWIDTH_BYTES if quick else BANDWIDTH_BYTES)
    run = Run(
        plan,
        timer,
        bandwidth,
        memory_limit,
        Console(stderr=True),
        options.baselines,
        captured,
        chosen_ops,
    )
    run.note(
        f"read bandwidth {bandwidth.read / 1e9:.4g} GB/s (sum of int64), "
        f"copy {bandwidth.copy / 1e9:.4g} GB/s (read and written)"
    )
    torch.manual_seed(0)
    with torch.no_grad(), Progress(console=run.console, transient=True) as progress:
        for name, report in reports.items():
            start = time.perf_counter()
            BENCHES[name].run(run, report, progress)
            run.note(f"{name}: {len(report.rows)} rows, {time.perf_counter() - start:.0f} s")
    caption = "; ".join(str(config) for config in run.plan.configs)
    for name, report in reports.items():
        if not report.rows:
            continue
        report.show(Console(), BENCHES[name].shown, BENCHES[name].title, caption)
        print(f"{len(report.rows)} rows in {report.path}")
    if run.errors:
        run.note(f"{len(run.errors)} cases failed")
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(app, "python -m bench")
