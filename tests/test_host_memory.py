"""Host memory is pinned in blocks, kept for the next that wants no more, and given back."""

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from devices import gpu_only
from hata import host_memory
from hata.host_memory import HostMemory, release_host_memory

MB = 1 << 20
GPU = torch.device("cuda", 0)


class Cudart:
    """Stands in for CUDA's runtime: notes what is pinned, refuses what it is told to."""

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.refuses = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> SimpleNamespace:
        if not self.refuses:
            assert not any(a < address + size and address < a + n for a, n in self.blocks.items())
            self.blocks[address] = size
        return SimpleNamespace(value=self.refuses)

    def cudaHostUnregister(self, address: int) -> None:
        del self.blocks[address]


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudart]:
    fake = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(host_memory, "_spare", {})
    monkeypatch.setattr(host_memory, "_forget_error", lambda device: None)
    yield fake
    release_host_memory()
    assert fake.blocks == {}


def test_blocks_follow_each_other_and_a_refusal_changes_nothing(cudart: Cudart) -> None:
    memory = HostMemory("test", 5 * MB + 1, GPU)
    assert memory.num_pinned == 0
    for end in (MB, MB, MB - 7, 3 * MB):
        memory.pin("test", end)
    assert sorted(cudart.blocks.values()) == [MB, 2 * MB]
    cudart.refuses = 2
    message = rf"hata.test: host memory must be pinned .* error 2 for {MB} bytes after {3 * MB}"
    with pytest.raises(RuntimeError, match=message):
        memory.pin("test", 4 * MB)
    assert memory.num_pinned == 3 * MB
    cudart.refuses = 0
    memory.pin("test", 99 * MB)  # no further than there is
    assert 5 * MB < memory.num_pinned < 6 * MB
    del memory


def test_what_is_pinned_is_kept_for_the_next_that_wants_no_more(cudart: Cudart) -> None:
    memory = HostMemory("test", 8 * MB, GPU)
    memory.pin("test", 4 * MB)
    pinned = dict(cudart.blocks)
    del memory
    assert cudart.blocks == pinned
    smaller, other = HostMemory("test", 6 * MB, GPU), HostMemory("test", MB, GPU)
    assert (smaller.num_pinned, other.num_pinned) == (4 * MB, 0)
    smaller.pin("test", 2 * MB)
    assert cudart.blocks == pinned
    other.pin("test", MB)
    del smaller, other  # the last one is kept
    assert sum(cudart.blocks.values()) == MB
    larger = HostMemory("test", 2 * MB, GPU)
    assert (larger.num_pinned, cudart.blocks) == (0, {})
    del larger


@gpu_only
def test_cuda_tensors_lie_in_it() -> None:
    """What is pinned already is refused, and the next kernel does not see the error."""
    memory = HostMemory("test", 2 * MB, GPU)
    memory.pin("test", MB)
    tensor = memory.tensor()
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr() + MB, MB, 3)
    assert status.value == 0
    with pytest.raises(RuntimeError, match=f"for {MB} bytes after {MB}"):
        memory.pin("test", 2 * MB)
    assert memory.num_pinned == MB
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr() + MB)
    memory.pin("test", 2 * MB)
    assert tensor.is_cuda
    tensor.fill_(7)
    assert int(tensor.long().sum()) == 7 * 2 * MB
    torch.cuda.synchronize()
    assert bytes(memory._range.mapping[-2:]) == b"\x07\x07"
    del memory, tensor
    release_host_memory()
