"""Host memory that a GPU reads and writes in place, taken from the system as it comes into use.

It is CUDA's managed memory, told to stay on the host. A GPU finds that by pages of 2 MB, and memory
that was registered or pinned by small ones, however the system holds it: rows at random then wait
for the GPU's page tables, and come at less than half of the bandwidth (docs/offload.md).
"""

import ctypes
import mmap
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20
# Of cuda.h: CUmemAttach_flags, CUmem_advise, CUmemLocationType.
_ATTACH_GLOBAL = 1
_SET_PREFERRED_LOCATION, _SET_ACCESSED_BY = 3, 5
_DEVICE, _HOST = 1, 2


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


@cache
def _library() -> Any:
    """CUDA's driver, which has what torch does not pass on."""
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status != 0:
        raise RuntimeError(f"CUDA error {status} of {name}")


class _Range:
    """A range of addresses, all zeros at first, whose start a device may have taken.

    Attributes:
        address: Where it begins.
        num_taken: Bytes at its start that the system has given; none where the device is the CPU.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device, self.num_taken = size, device, 0
        if device.type == "cpu":
            self.mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.address = torch.frombuffer(self.mapping, dtype=torch.uint8).data_ptr()
            return
        pointer = ctypes.c_uint64()
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # there is a context from now on
            flags = ctypes.c_uint(_ATTACH_GLOBAL)
            _call("cuMemAllocManaged", ctypes.byref(pointer), ctypes.c_size_t(size), flags)
            self.address = pointer.value
            for advice, place in (
                (_SET_PREFERRED_LOCATION, _Location(_HOST, 0)),
                (_SET_ACCESSED_BY, _Location(_DEVICE, device.index)),
            ):
                _call("cuMemAdvise_v2", pointer, ctypes.c_size_t(size), ctypes.c_int(advice), place)

    def take(self, end: int) -> None:
        """Has the system give the bytes up to ``end``, and the device map them."""
        start = ctypes.c_uint64(self.address + self.num_taken)
        size = ctypes.c_size_t(end - self.num_taken)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            order = (ctypes.c_uint(0), ctypes.c_void_p(stream.cuda_stream))  # flags, stream
            _call("cuMemPrefetchAsync_v2", start, size, _Location(_HOST, 0), *order)
            stream.synchronize()
        self.num_taken = end

    def free(self) -> None:
        """Gives everything back, once no kernel reads it."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            _call("cuMemFree_v2", ctypes.c_uint64(self.address))


# What the last deleted HostMemory of each GPU has left: taking takes a second for 4 GB.
_spare: dict[torch.device, _Range] = {}


class HostMemory:
    """A range of host memory, which the device's kernels address as their own.

    The range is only reserved: the system gives it pages as they are taken or, where the device is
    the CPU, as they are written. With CUDA's unified addressing a byte has one address, which
    kernels read and write over PCIe; so a CUDA tensor may lie in host memory, and every operator
    takes it. What is not taken yet should not be touched from the device: each page would be a
    fault.

    It lives as long as a tensor of it. What it has taken is then kept for the next one on the same
    GPU, if that wants no more, which finds anything in it; or until `release_host_memory`.

    Args:
        function: The public function that asks, for error messages.
        num_bytes: Size of the range.
        device: The device that is to read it, with its index; the CPU needs nothing taken.

    Raises:
        RuntimeError: The system does not reserve as much.
    """

    def __init__(self, function: str, num_bytes: int, device: torch.device) -> None:
        self.device = device
        self._size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        spare = _spare.pop(device, None)
        if spare is not None:
            torch.cuda.synchronize(device)  # kernels of its last owner may still read and write it
            if spare.size < self._size:
                spare.free()
                spare = None
        try:
            self._range = _Range(self._size, device) if spare is None else spare
        except (OSError, ValueError, OverflowError, RuntimeError) as error:
            raise RuntimeError(
                f"hata.{function}: host memory must have room for {num_bytes} bytes, got {error}"
            ) from error
        if device.type == "cuda":
            weakref.finalize(self, _keep, self._range).atexit = False  # type: ignore[misc]

    @property
    def num_taken(self) -> int:
        """Bytes at the start of the range that are taken; none where the device is the CPU."""
        return self._range.num_taken

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What `torch.as_tensor` makes a CUDA tensor from, without a copy."""
        data = (self._range.address, False)
        return {"shape": (self._size,), "typestr": "|u1", "data": data, "version": 3}

    def tensor(self) -> Tensor:
        """Returns all of it as the device's tensor, ``[num_bytes]``, uint8."""
        if self.device.type == "cpu":
            return torch.frombuffer(self._range.mapping, dtype=torch.uint8)
        return torch.as_tensor(self, device=self.device)

    def take(self, function: str, num_bytes: int) -> None:
        """Takes the start of the range from the system, as far as it is not.

        Args:
            function: The public function that asks, for error messages.
            num_bytes: Where the taken part is to end, or a little later.

        Raises:
            RuntimeError: CUDA refuses; what was taken stays, and nothing else has changed.
        """
        start, end = self.num_taken, min(-(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES, self._size)
        if self.device.type == "cpu" or end <= start:
            return
        try:
            self._range.take(end)
        except RuntimeError as error:
            raise RuntimeError(
                f"hata.{function}: host memory must be there for keys and values, got {error} for "
                f"{end - start} bytes after {start}"
            ) from error


def release_host_memory() -> None:
    """Gives back the host memory that deleted caches have left for the next ones."""
    while _spare:
        _spare.popitem()[1].free()


def _keep(range_: _Range) -> None:
    """Keeps the memory of a deleted HostMemory in place of what was kept before."""
    before = _spare.pop(range_.device, None)
    if before is not None:
        before.free()
    _spare[range_.device] = range_
