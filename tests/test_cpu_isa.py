"""The CPU operators with each instruction set forced; test_cpu_loops.py tests their loops alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    f"tests/{name}.py" for name in ("test_properties", "test_hash_encode", "test_encode_query")
]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_operators_pass_with_the_isa_forced(internals, isa):
    if isa not in internals.supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    environment = {**os.environ, "HATA_CPU_ISA": isa, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
