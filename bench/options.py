"""What the command line of ``python -m bench`` takes, and its checks."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from typer import Option

import hata
from hata.checks import check
from hata.outputs import make_room_for

from . import ops
from .baselines import Baselines

MEMORY_LIMIT_GB = {"cuda": 40.0, "cpu": 8.0}


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the rows go."""

    output: Annotated[
        Path | None,
        Option(
            help="CSV file, or the folder of several; by default in bench/results, "
            "<command>_<device>.csv."
        ),
    ] = None
    append: Annotated[bool, Option("--append", help="Keep the rows that the CSV files have.")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """What the command line chose, the same for every benchmark of a run."""

    device: Annotated[
        str | None, Option(help="cpu or cuda; by default cuda where there is one.")
    ] = None
    quick: Annotated[
        bool, Option("--quick", help="Few small shapes with warm caches: a check, no figure.")
    ] = False
    memory_limit_gb: Annotated[
        float | None,
        Option(
            help="For the rotated K and V caches; by default 40 on a GPU, 8 on a CPU, and never "
            "more than half of the memory."
        ),
    ] = None
    grid: Annotated[
        list[str],
        Option(
            help="Shapes of the decoding step; may be repeated. table (the default): eight shapes. "
            "figure5: the axes of the paper's figure 5. budget: top_k from 0.4 to 12.5 %. "
            "crossover: from 512 tokens until hata wins. few: few KV heads, or many short "
            "sequences. million: a million tokens. fp8: the table over float8 caches. "
            "wide: head_dim 256, and groups of sixteen. docs/benchmarks.md says how long each "
            "takes."
        ),
    ] = field(default_factory=list)
    op: Annotated[
        list[str], Option(help=f"Which: {', '.join(ops.OPS)}; may be repeated; by default all.")
    ] = field(default_factory=list)
    shape: Annotated[
        list[str],
        Option(help='Only this one, as it is printed: "8 x 32/8 x 128K"; may be repeated.'),
    ] = field(default_factory=list)
    codes: Annotated[list[str], Option(help="Only this setting: A, B or C; may be repeated.")] = (
        field(default_factory=list)
    )
    baselines: Annotated[
        Baselines,
        Option(
            help="What is measured beside hata: all that is installed, torch's own, or no dense "
            "attention and top-k. FlashInfer may compile for a minute when it is first called."
        ),
    ] = Baselines.ALL
    inputs: Annotated[
        Path | None,
        Option(help="Queries and keys from a file of python -m bench capture; by default random."),
    ] = None

    def words(self) -> list[str]:
        """Returns the options that decide what a row holds, as they are typed."""
        return [
            *["--quick"] * self.quick,
            *repeated("--grid", self.grid),
            *repeated("--op", self.op),
            *repeated("--shape", [f"'{name}'" for name in self.shape]),
            *repeated("--codes", self.codes),
            *["--baselines", self.baselines.value] * (self.baselines is not Baselines.ALL),
            *(["--inputs", self.inputs.name] if self.inputs else []),
        ]


def repeated(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def checked_names(
    option: str, names: Sequence[str], known: Iterable[str], default: Sequence[str]
) -> tuple[str, ...]:
    for name in names:
        check(name in known, "bench", option, f"be one of {', '.join(known)}", name)
    return tuple(names or default)


def checked_device(device_type: str | None) -> torch.device:
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    check(device_type in MEMORY_LIMIT_GB, "bench", "--device", "be cpu or cuda", device_type)
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
    make_room_for(path, "bench", "--output")


def check_rows(results: Path, device: str) -> None:
    path = results / f"decode_{device}.csv"
    check(path.is_file(), "bench", "--device", "have rows in --results", f"no {path}")
