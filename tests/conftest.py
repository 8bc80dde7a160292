import importlib
from types import ModuleType

import numpy as np
import pytest
import torch

DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `device` runs on every device, one that takes `dtype` in every dtype."""
    if "dtype" in metafunc.fixturenames:
        pairs = [(device, dtype) for device in DEVICES for dtype in DTYPES[device]]
        ids = [f"{device}-{str(dtype).removeprefix('torch.')}" for device, dtype in pairs]
        metafunc.parametrize(("device", "dtype"), pairs, ids=ids)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def internals() -> ModuleType:
    """C++ internals for numpy (tests/internals)."""
    try:
        return importlib.import_module("internals.hata_internals")
    except ModuleNotFoundError:
        pytest.fail(
            "tests/internals/hata_internals is not built: run `make build-tests`, or "
            "`cmake -S . -B build -DHATA_BUILD_TESTS=ON && cmake --build build`"
        )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
