"""Host memory that a GPU reads and writes in place, pinned as it comes into use."""

import contextlib
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

_REGISTER_FLAGS = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped


class _Range:
    """Anonymous memory, all zeros at first, whose start a device may have pinned.

    Attributes:
        mapping: The memory.
        address: Where it begins.
        blocks: Address and size of each pinned block, one after the other from the start.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            self.mapping.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to pin, fewer to look up
        self.address = torch.frombuffer(self.mapping, dtype=torch.uint8).data_ptr()
        self.blocks: list[tuple[int, int]] = []

    def unpin(self) -> None:
        """Unpins everything, once no kernel reads it."""
        if self.blocks:
            torch.cuda.synchronize(self.device)
        while self.blocks:
            torch.cuda.cudart().cudaHostUnregister(self.blocks.pop()[0])


# What the last deleted HostMemory of each GPU has left, pinned: pinning takes a second for 4 GB.
_spare: dict[torch.device, _Range] = {}


class HostMemory:
    """A range of host memory, which the device's kernels address as their own.

    The range is only reserved: the system gives it pages as they are pinned or, where the device is
    the CPU, as they are written. With CUDA's unified addressing a pinned byte has one address,
    which kernels read and write over PCIe; so a CUDA tensor may lie in host memory, and every
    operator takes it. What is not pinned yet must not be touched from the device, and a copy by
    cudaMemcpy must not cross two blocks that were pinned apart.

    It lives as long as a tensor of it. What it has pinned is then kept for the next one on the same
    GPU, if that wants no more, which finds anything in it; or until `release_host_memory`.

    Args:
        function: The public function that asks, for error messages.
        num_bytes: Size of the range.
        device: The device that is to read it, with its index; the CPU needs nothing pinned.

    Raises:
        RuntimeError: The system does not reserve as much.
    """

    def __init__(self, function: str, num_bytes: int, device: torch.device) -> None:
        self.device = device
        self._size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        spare = _spare.pop(device, None)
        if spare is not None:
            torch.cuda.synchronize(device)  # kernels of its last owner may still read and write it
            if len(spare.mapping) < self._size:
                spare.unpin()
                spare = None
        try:
            self._range = _Range(self._size, device) if spare is None else spare
        except (OSError, ValueError, OverflowError) as error:
            raise RuntimeError(
                f"hata.{function}: host memory must have room for {num_bytes} bytes, got {error}"
            ) from error
        if device.type == "cuda":
            weakref.finalize(self, _keep, self._range).atexit = False  # type: ignore[misc]

    @property
    def num_pinned(self) -> int:
        """Bytes at the start of the range that are pinned; none where the device is the CPU."""
        return sum(size for _, size in self._range.blocks)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What `torch.as_tensor` makes a CUDA tensor from, without a copy."""
        data = (self._range.address, False)
        return {"shape": (self._size,), "typestr": "|u1", "data": data, "version": 3}

    def tensor(self) -> Tensor:
        """Returns all of it as the device's tensor, ``[num_bytes]``, uint8; something is pinned."""
        if self.device.type == "cpu":
            return torch.frombuffer(self._range.mapping, dtype=torch.uint8)
        return torch.as_tensor(self, device=self.device)

    def pin(self, function: str, num_bytes: int) -> None:
        """Pins the start of the range, as far as it is not.

        Args:
            function: The public function that asks, for error messages.
            num_bytes: Where the pinned part is to end, or a little later.

        Raises:
            RuntimeError: CUDA refuses; what was pinned stays, and nothing else has changed.
        """
        start = self.num_pinned
        size = min(-(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE, self._size) - start
        if self.device.type == "cpu" or size <= 0:
            return
        address = self._range.address + start
        with torch.cuda.device(self.device):
            status = torch.cuda.cudart().cudaHostRegister(address, size, _REGISTER_FLAGS)
            if status.value != 0:
                _forget_error(self.device)
                raise RuntimeError(
                    f"hata.{function}: host memory must be pinned for keys and values, got CUDA "
                    f"error {status.value} for {size} bytes after {start}"
                )
        self._range.blocks.append((address, size))


def release_host_memory() -> None:
    """Unpins and gives back the host memory that deleted caches have left for the next ones."""
    while _spare:
        _spare.popitem()[1].unpin()


def _forget_error(device: torch.device) -> None:
    """Takes the error that CUDA shows to whoever asks next: torch does after each kernel."""
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device=device).fill_(0)


def _keep(range_: _Range) -> None:
    """Keeps the pinned memory of a deleted HostMemory in place of what was kept before."""
    before = _spare.pop(range_.device, None)
    if before is not None:
        before.unpin()
    _spare[range_.device] = range_
