"""What the tests run on: every device present, its dtypes and its ways to select."""

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = {
    "cpu": [torch.float32, torch.float16, torch.bfloat16],
    "cuda": [torch.float16, torch.bfloat16],
}
HEAD_DIMS = {"cpu": [*range(8, 257, 8), 512], "cuda": [64, 96, 128, 192, 256, 512]}

# What HATA_SCORE_SELECT takes (csrc/bindings/score_select.cpp); the value is the oldest compute
# capability that has the algorithm.
ALGORITHMS = {
    **{"auto": (8, 0), "two_kernels": (8, 0)},
    **{"cluster": (9, 0), "candidates": (9, 0), "grid": (9, 0)},
}

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def algorithms(device: str) -> list[str]:
    """The algorithms of score_select to test there; the CPU has one."""
    if device not in DEVICES or device == "cpu":
        return ["auto"]
    capability = torch.cuda.get_device_capability()
    return [name for name, oldest in ALGORITHMS.items() if capability >= oldest]
