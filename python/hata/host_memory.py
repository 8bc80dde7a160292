"""Host memory that a GPU reads and writes in place, pinned as it comes into use."""

import contextlib
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

_REGISTER_FLAGS = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped


class HostMemory:
    """A range of host memory, all zeros at first, which the device's kernels address as their own.

    The range is only reserved: the system gives it pages as they are pinned or, where the device is
    the CPU, as they are written. It goes back once no tensor of `tensor` is left.

    With CUDA's unified addressing a pinned byte has one address, which kernels read and write over
    PCIe; so a CUDA tensor may lie in host memory, and every operator takes it. What is not pinned
    yet must not be touched from the device.

    Args:
        function: The public function that asks, for error messages.
        num_bytes: Size of the range.
        device: The device that is to read it; the CPU needs nothing pinned.

    Raises:
        RuntimeError: The system does not reserve as much.
    """

    def __init__(self, function: str, num_bytes: int, device: torch.device) -> None:
        self._size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._mapping = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise RuntimeError(
                f"hata.{function}: host memory must have room for {num_bytes} bytes, got {error}"
            ) from error
        with contextlib.suppress(OSError):  # a kernel without them
            self._mapping.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to pin, fewer to look up
        self.device = device
        self._address = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr()
        self._pinned: list[tuple[int, int]] = []  # address and size of each block
        if device.type == "cuda":
            weakref.finalize(self, _unpin, self._mapping, self._pinned, device)

    @property
    def num_pinned(self) -> int:
        """Bytes at the start of the range that are pinned; none where the device is the CPU."""
        return sum(size for _, size in self._pinned)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What `torch.as_tensor` makes a CUDA tensor from, without a copy."""
        data = (self._address, False)
        return {"shape": (self._size,), "typestr": "|u1", "data": data, "version": 3}

    def tensor(self) -> Tensor:
        """Returns all of it as the device's tensor, ``[num_bytes]``, uint8; something is pinned."""
        if self.device.type == "cpu":
            return torch.frombuffer(self._mapping, dtype=torch.uint8)
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
        address = self._address + start
        with torch.cuda.device(self.device):
            status = torch.cuda.cudart().cudaHostRegister(address, size, _REGISTER_FLAGS)
            if status.value != 0:
                # CUDA shows a refusal to whoever asks next, which is torch after its next kernel.
                with contextlib.suppress(RuntimeError):
                    torch.empty(1, device=self.device).fill_(0)
                raise RuntimeError(
                    f"hata.{function}: host memory must be pinned for keys and values, got CUDA "
                    f"error {status.value} for {size} bytes after {start}"
                )
        self._pinned.append((address, size))


def _unpin(mapping: mmap.mmap, pinned: list[tuple[int, int]], device: torch.device) -> None:
    """Unpins the blocks of a mapping, which must outlive them, once no kernel reads them."""
    if pinned:
        torch.cuda.synchronize(device)
        for address, _ in pinned:
            torch.cuda.cudart().cudaHostUnregister(address)
