"""The command ``python -m bench``: each operator alone, and the whole decoding step."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from typer import Option

from hata.checks import check
from hata.cli import run_app
from hata.commands.options import with_options
from hata.device import ModelFolder
from hata.provenance import origin

from . import decode, ops, variants
from .capture import capture
from .cases import CONFIGS
from .generate import measure_generate
from .grids import GRIDS, plan_for
from .hit_rate import measure_hit_rate
from .inputs import Captured
from .lossless import measure_lossless
from .offload import measure_offload
from .options import (
    Options,
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
from .vllm_arrivals import measure_arrivals
from .vllm_quality import measure_quality

app = typer.Typer(
    help="Measures each operator and the whole decoding step against what their bytes allow.",
    rich_markup_mode=None,
)


BENCHES = {"ops": ops, "decode": decode, "variants": variants}
BUDGET_S = {"cuda": 0.03, "cpu": 0.5}  # of one measurement
QUICK_BUDGET_S = 0.01
BANDWIDTH_BYTES = (2 << 30) - (1 << 20)  # PyTorch sums up to 2 GiB in one kernel
QUICK_BANDWIDTH_BYTES = 128 << 20
CHOICES = ("grid", "op", "shape", "codes", "baselines", "inputs")  # of some commands alone

RowsOf = Annotated[str, Option(help="Whose rows: decode_<device>.csv in --results.")]
ResultsFolder = Annotated[Path, Option(help="Folder of the CSV files.")]


@app.callback(invoke_without_command=True)
@with_options(without=CHOICES)
def default(ctx: typer.Context, options: Options) -> None:
    """Measures each operator and the whole decoding step; without a subcommand, everything."""
    if ctx.invoked_subcommand is None:
        measure("all", options)
    elif options != Options():
        rule = f"follow the subcommand {ctx.invoked_subcommand}"
        check(False, "bench", "options", rule, "some before it")


@app.command("ops")
@with_options(without=("grid", "codes"))
def measure_ops(options: Options) -> None:
    """Measures each operator alone, against generic ways to do the same."""
    measure("ops", options)


@app.command("decode")
@with_options(without=("op",))
def measure_decode(options: Options) -> None:
    """Measures the whole decoding step against dense attention."""
    measure("decode", options)


@app.command("variants")
@with_options(without=CHOICES)
def measure_variants(options: Options) -> None:
    """Measures unusual settings of the step against what their bytes predict."""
    measure("variants", options)


@app.command("all")
@with_options(without=("op", "shape", "codes", "inputs"))
def measure_all(options: Options) -> None:
    """Measures the operators, the step and its variants in one run."""
    measure("all", options)


@app.command("capture")
def capture_inputs(
    output: Annotated[Path, Option(help="The safetensors file to write.")],
    model: ModelFolder = None,
    tokens: Annotated[int, Option(help="Length of the text.")] = 4096,
    layer: Annotated[int, Option(help="Which layer, from 0.")] = 14,
) -> None:
    """Writes a real layer's queries and keys to a file for --inputs; half a minute on a CPU."""
    check_output(output)
    capture(output, model, tokens, layer)
    print(f"{tokens} tokens of layer {layer} in {output}")


@app.command("plot")
def plot_results(
    device: RowsOf = "h100",
    results: ResultsFolder = RESULTS,
    output: Annotated[Path, Option(help="Folder of the pictures.")] = ROOT / "docs" / "plots",
    png: Annotated[bool, Option("--png", help="PNG instead of SVG.")] = False,
) -> None:
    """Draws the results as pictures; those whose rows are missing are left out."""
    check_rows(results, device)
    check_output(output / "picture")
    check(find_spec("matplotlib") is not None, "bench", "matplotlib", "be installed", "none")
    from .plot import plot_all

    for path in plot_all(results, device, output, "png" if png else "svg"):
        print(path)


@app.command("tables")
def print_tables(device: RowsOf = "h100", results: ResultsFolder = RESULTS) -> None:
    """Prints the results as Markdown tables."""
    check_rows(results, device)
    print(all_tables(results, device))


app.command("generate")(measure_generate)
app.command("offload")(measure_offload)
app.command("hit-rate")(measure_hit_rate)
app.command("lossless")(measure_lossless)
app.command("vllm")(measure_vllm)
app.command("vllm-arrivals")(measure_arrivals)
app.command("vllm-quality")(measure_quality)


def measure(command: str, options: Options) -> None:
    """Runs one benchmark, or all; several write into the folder ``output``, one to the file."""
    names = list(BENCHES) if command == "all" else [command]
    device = checked_device(options.device)
    grids = checked_names("--grid", options.grid, GRIDS, default=("table",))
    chosen_ops = checked_names("--op", options.op, ops.OPS, default=ops.OPS)
    codes = checked_names("--codes", options.codes, [config.name for config in CONFIGS], ())
    plan = plan_for(device, grids, options.quick).only(options.shape, codes)
    memory_limit = checked_memory_limit(options.memory_limit_gb, device)
    captured = Captured.load(options.inputs) if options.inputs else None
    quick = options.quick
    files = {name: f"{name}_{slug(device)}{'_quick' * quick}.csv" for name in names}
    folder = options.output if options.output and command == "all" else RESULTS
    paths = {name: folder / file for name, file in files.items()}
    if options.output and command != "all":
        paths = {command: options.output}
    for path in paths.values():
        check_output(path)
    words = ["python -m bench", command, f"--device {device.type}", *options.words()]
    common = origin(device, " ".join(words))
    reports = {
        name: Report(path, BENCHES[name].COLUMNS, common, options.append)
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
            BENCHES[name].bench(run, report, progress)
            run.note(f"{name}: {len(report.rows)} rows, {time.perf_counter() - start:.0f} s")
    caption = "; ".join(str(config) for config in run.plan.configs)
    for name, report in reports.items():
        if not report.rows:
            continue
        report.show(Console(), BENCHES[name].SHOWN, BENCHES[name].TITLE, caption)
        print(f"{len(report.rows)} rows in {report.path}")
    if run.errors:
        run.note(f"{len(run.errors)} cases failed")
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(app, "python -m bench")
