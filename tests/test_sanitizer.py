"""The CUDA kernels under compute-sanitizer: no access out of bounds, no race, no stray barrier."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devices import gpu_only

DRIVER = [sys.executable, str(Path(__file__).with_name("sanitizer_driver.py"))]


def test_the_driver_passes_by_itself():
    subprocess.run(DRIVER, check=True)


@gpu_only
@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_the_kernels_are_clean(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.fail('compute-sanitizer must be on the PATH, or be left out with -m "not sanitizer"')
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--print-limit", "20", *DRIVER]
    command.append(tool)
    # Each tensor in an allocation of its own: what lies beyond it is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
