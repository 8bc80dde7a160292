"""The options --model, --device and --dtype."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from typer import Option

from hata.checks import check

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ModelFolder = Annotated[
    Path | None, Option(help="Local transformers folder; by default SmolLM2-135M-Instruct.")
]
DeviceName = Annotated[
    str | None, Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
]
DtypeName = Annotated[
    str | None,
    Option(help="float32, bfloat16 or float16; by default float32, on a GPU bfloat16."),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model to run, where and in which dtype."""

    model: ModelFolder = None
    device: DeviceName = None
    dtype: DtypeName = None


def torch_device(name: str | None, command: str) -> torch.device:
    """Returns the device to run on: the named one, else a GPU where there is one.

    Raises:
        ValueError: torch does not see it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    rule = "be cpu, cuda or cuda:N, a device that torch sees"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"hata.{command}: --device must {rule}, got {name}") from error
    count = torch.cuda.device_count()
    seen = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count)
    check(seen, command, "--device", rule, name)
    return device


def torch_dtype(name: str | None, device: torch.device, command: str) -> torch.dtype:
    """Returns the dtype to run in: the named one, else float32 on a CPU and bfloat16 on a GPU.

    Raises:
        ValueError: The name is no key of `DTYPES`.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    check(name in DTYPES, command, "--dtype", f"be one of {', '.join(DTYPES)}", name)
    return DTYPES[name]
