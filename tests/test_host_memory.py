"""Host memory is taken in blocks, kept for the next that wants no more, and given back."""

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from devices import gpu_only
from hata import host_memory
from hata.host_memory import HostMemory, release_host_memory

MB = 1 << 20
GPU = torch.device("cuda", 0)


class Driver:
    """Stands in for CUDA's driver: notes what there is, refuses what it is told to."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # of the ranges, by address
        self.taken: dict[int, int] = {}  # by address, as far as it goes without a gap
        self.advice: list[tuple[int, int, int]] = []
        self.refuses = 0

    def cuMemAllocManaged(self, pointer: Any, size: Any, flags: Any) -> int:
        if not self.refuses:
            pointer._obj.value = (len(self.sizes) + 1) << 40
            self.sizes[pointer._obj.value] = size.value
            self.taken[pointer._obj.value] = 0
        return self.refuses

    def cuMemAdvise_v2(self, pointer: Any, size: Any, advice: Any, place: Any) -> int:
        assert self.sizes[pointer.value] == size.value
        self.advice.append((advice.value, place.type, place.id))
        return 0

    def cuMemPrefetchAsync_v2(self, start: Any, size: Any, place: Any, *rest: Any) -> int:
        assert place.type == 2  # the host
        if not self.refuses:
            address = start.value >> 40 << 40
            assert start.value == address + self.taken[address]
            self.taken[address] += size.value
            assert self.taken[address] <= self.sizes[address]
        return self.refuses

    def cuMemFree_v2(self, address: Any) -> int:
        del self.sizes[address.value], self.taken[address.value]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    monkeypatch.setattr(host_memory, "_library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(host_memory, "_spare", {})
    yield fake
    release_host_memory()
    assert fake.sizes == {}


def test_blocks_follow_each_other_and_a_refusal_changes_nothing(driver: Driver) -> None:
    memory = HostMemory("test", 9 * MB + 1, GPU)
    assert memory.num_taken == 0
    assert driver.advice == [(3, 2, 0), (5, 1, 0)]  # prefers the host, is accessed by the GPU
    for end in (2 * MB, MB, 2 * MB - 7, 5 * MB):
        memory.take("test", end)
    assert list(driver.taken.values()) == [6 * MB]  # whole pages of 2 MB
    driver.refuses = 2
    message = (
        r"hata.test: host memory must be there for keys and values, got CUDA error 2 of "
        rf"cuMemPrefetchAsync_v2 for {2 * MB} bytes after {6 * MB}"
    )
    with pytest.raises(RuntimeError, match=message):
        memory.take("test", 8 * MB)
    with pytest.raises(RuntimeError, match=f"must have room for {MB} bytes, got CUDA error 2"):
        HostMemory("test", MB, GPU)
    assert memory.num_taken == 6 * MB
    driver.refuses = 0
    memory.take("test", 99 * MB)  # no further than there is
    assert 9 * MB < memory.num_taken < 10 * MB
    del memory


def test_what_is_taken_is_kept_for_the_next_that_wants_no_more(driver: Driver) -> None:
    memory = HostMemory("test", 8 * MB, GPU)
    memory.take("test", 4 * MB)
    taken = dict(driver.taken)
    del memory
    assert driver.taken == taken
    smaller, other = HostMemory("test", 6 * MB, GPU), HostMemory("test", 2 * MB, GPU)
    assert (smaller.num_taken, other.num_taken) == (4 * MB, 0)
    smaller.take("test", 2 * MB)
    assert sum(driver.taken.values()) == 4 * MB
    other.take("test", 2 * MB)
    del smaller, other  # the last one is kept
    assert list(driver.taken.values()) == [2 * MB]
    larger = HostMemory("test", 4 * MB, GPU)
    assert (larger.num_taken, list(driver.taken.values())) == (0, [0])
    del larger


@gpu_only
def test_cuda_tensors_lie_in_it() -> None:
    """Kernels read and write it, and so does the host, without its having moved."""
    memory = HostMemory("test", 8 * MB, GPU)
    memory.take("test", 2 * MB)
    memory.take("test", 8 * MB)
    tensor = memory.tensor()
    assert tensor.is_cuda
    assert int(tensor.long().sum()) == 0
    tensor.fill_(7)
    assert int(tensor.long().sum()) == 7 * 8 * MB
    torch.cuda.synchronize()
    assert ctypes.string_at(tensor.data_ptr() + 8 * MB - 2, 2) == b"\x07\x07"
    del memory, tensor
    release_host_memory()
