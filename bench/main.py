"""The command ``hata bench``: each operator alone, and the whole decoding step."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import hata
from hata.checks import check

from . import decode, ops
from .cases import plan_for
from .report import RESULTS, Report, origin, slug
from .run import Run
from .timing import Timer, measure_bandwidth

app = typer.Typer(
    help="Measures each operator and the whole decoding step against what their bytes allow."
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
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
MEMORY_LIMIT_GB = {"cuda": 40.0, "cpu": 8.0}
BUDGET_S = {"cuda": 0.1, "cpu": 1.0}  # of one measurement
QUICK_BUDGET_S = 0.01
BANDWIDTH_BYTES = (2 << 30) - (1 << 20)  # PyTorch sums up to 2 GiB in one kernel
QUICK_BANDWIDTH_BYTES = 128 << 20

DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda; by default cuda where there is one.")
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="One small shape with warm caches: a check, no figure.")
]
FileOption = Annotated[
    Path | None,
    typer.Option("--output", help="CSV file; by default bench/results/<command>_<device>.csv."),
]
FolderOption = Annotated[
    Path | None,
    typer.Option("--output", help="Folder of the CSV files; by default bench/results."),
]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        "--memory-limit-gb",
        help="For the rotated K and V caches; by default 40 on a GPU, 8 on a CPU, and never more "
        "than half of the memory.",
    ),
]


@app.callback(invoke_without_command=True)
def default(
    ctx: typer.Context,
    device: DeviceOption = None,
    quick: QuickOption = False,
    output: FolderOption = None,
    memory_limit_gb: MemoryOption = None,
) -> None:
    """Measures each operator and the whole decoding step; without a subcommand, both."""
    if ctx.invoked_subcommand is None:
        measure("all", list(BENCHES), device, quick, output, memory_limit_gb)
    elif device or quick or output or memory_limit_gb is not None:
        rule = f"follow the subcommand {ctx.invoked_subcommand}"
        check(False, "bench", "options", rule, "some before it")


@app.command("ops")
def measure_ops(
    device: DeviceOption = None,
    quick: QuickOption = False,
    output: FileOption = None,
    memory_limit_gb: MemoryOption = None,
) -> None:
    """Measures each operator alone."""
    measure("ops", ["ops"], device, quick, output, memory_limit_gb)


@app.command("decode")
def measure_decode(
    device: DeviceOption = None,
    quick: QuickOption = False,
    output: FileOption = None,
    memory_limit_gb: MemoryOption = None,
) -> None:
    """Measures the whole decoding step against dense attention."""
    measure("decode", ["decode"], device, quick, output, memory_limit_gb)


@app.command("all")
def measure_all(
    device: DeviceOption = None,
    quick: QuickOption = False,
    output: FolderOption = None,
    memory_limit_gb: MemoryOption = None,
) -> None:
    """Measures both in one run."""
    measure("all", list(BENCHES), device, quick, output, memory_limit_gb)


def measure(
    command: str,
    names: list[str],
    device_type: str | None,
    quick: bool,
    output: Path | None,
    memory_limit_gb: float | None,
) -> None:
    """Runs the benchmarks ``names``; several write into the folder ``output``, one to the file."""
    device = checked_device(device_type)
    memory_limit = checked_memory_limit(memory_limit_gb, device)
    files = {name: f"{name}_{slug(device)}{'_quick' * quick}.csv" for name in names}
    if command == "all":
        paths = {name: (output or RESULTS) / file for name, file in files.items()}
    else:
        paths = {name: output or RESULTS / file for name, file in files.items()}
    for path in paths.values():
        check_output(path)

    budget = QUICK_BUDGET_S if quick else BUDGET_S[device.type]
    timer = Timer(device, budget, cold=not quick)
    bandwidth = measure_bandwidth(timer, QUICK_BANDWIDTH_BYTES if quick else BANDWIDTH_BYTES)
    plan = plan_for(device, quick)
    console = Console(stderr=True)
    run = Run(device, DTYPES[device.type], plan, timer, bandwidth, memory_limit, console)
    run.note(
        f"read bandwidth {bandwidth.read / 1e9:.4g} GB/s (sum of int64), "
        f"copy {bandwidth.copy / 1e9:.4g} GB/s (read and written)"
    )
    words = ["hata bench", command, f"--device {device.type}", *["--quick"] * quick]
    common = origin(device, " ".join(words))
    reports = {name: Report(path, BENCHES[name].columns, common) for name, path in paths.items()}
    torch.manual_seed(0)
    with torch.no_grad(), Progress(console=console, transient=True) as progress:
        for name, report in reports.items():
            BENCHES[name].run(run, report, progress)
    caption = "; ".join(str(config) for config in plan.configs)
    for name, report in reports.items():
        if not report.rows:
            continue
        report.show(Console(), BENCHES[name].shown, BENCHES[name].title, caption)
        print(f"{len(report.rows)} rows in {report.path}")
    if run.errors:
        run.note(f"{len(run.errors)} cases failed")
        raise typer.Exit(1)


def checked_device(device_type: str | None) -> torch.device:
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    check(device_type in DTYPES, "bench", "--device", "be cpu or cuda", device_type)
    seen = device_type == "cpu" or torch.cuda.is_available()
    check(seen, "bench", "--device", "be one that torch sees", f"{device_type} and no GPU")
    device = torch.device(device_type)
    if device_type == "cuda":
        out = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
        lse = torch.zeros(1, 1, 1, device=device)
        hata.merge_attention_states(out, lse, out, lse)  # says so if hata was built without CUDA
    return device


def checked_memory_limit(gigabytes: float | None, device: torch.device) -> int:
    """Returns bytes."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info()[0]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if gigabytes is None:
        return int(min(MEMORY_LIMIT_GB[device.type] * 1e9, memory / 2))
    fits = 0 < gigabytes * 1e9 <= memory
    rule = f"be above 0 and at most the {memory / 1e9:.0f} of this machine"
    check(fits, "bench", "--memory-limit-gb", rule, f"{gigabytes:g}")
    return int(gigabytes * 1e9)


def check_output(path: Path) -> None:
    check(not path.is_dir(), "bench", "--output", "be a file", f"the folder {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    check(writable, "bench", "--output", "lie in a folder that can be written", path)
