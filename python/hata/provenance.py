"""What made a result: machine, versions and command."""

import contextlib
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def commit() -> str:
    """Returns the checkout's commit, "-dirty" where files have changed.

    HATA_COMMIT, where it is set, names it instead: for a copy of the files whose git does not know.
    Where hata does not lie in a checkout it is "unknown".
    """
    if named := os.environ.get("HATA_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(
                describe, check=True, capture_output=True, text=True
            ).stdout.strip()
    return "unknown"


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or the CPU's model and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    model = re.search(r"model name\s*: (.+)", text)
    name = model.group(1) if model else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def origin(device: torch.device, command: str) -> dict[str, str]:
    """Returns the columns that say where a run's rows come from."""
    return {
        "gpu": device_name(device),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }
