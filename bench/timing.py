"""Times calls whose inputs are not in the cache.

The caller passes one call per input set, and as many sets as exceed twice the last-level cache
together (``Timer.num_sets``), so that each call finds its inputs in memory. On a GPU all calls are
captured in one CUDA graph and its replays are timed with events; the replays are queued back to
back, so that no launch latency of the host is in the figure, behind others that warm up. On a CPU
each call is timed alone.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]


def first_line(error: BaseException) -> str:
    """Returns an error's message without the stack traces that some libraries put into it."""
    return (str(error).strip() or repr(error)).splitlines()[0]


# After gigabytes were written the same step has taken 13 % longer for its first 30 ms on an H100.
WARM_UP_S = 0.05
MIN_GRAPH_CALLS = 8  # the gap between two replays is shared by at least so many calls
MIN_REPEATS = 5
MAX_REPEATS = 15
MAX_CPU_SAMPLES = 1000
HOST_BATCHES = 10
HOST_CALLS = 100
MAX_SETS = 2048  # a graph of more calls takes longer to capture than to time


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median, and the distance between the quartiles."""

    us: float
    spread_us: float


class Timer:
    """Times calls on one device.

    Args:
        device: Where the calls run.
        budget_s: About how long one measurement takes.
        cold: False allows input sets that stay in the cache: quicker, and no figure to quote.
    """

    def __init__(self, device: torch.device, budget_s: float, cold: bool = True) -> None:
        self.device = device
        self.budget_s = budget_s
        self.cold_bytes = 2 * cache_bytes(device) if cold else 0

    def num_sets(self, bytes_per_call: int) -> int:
        """Returns how many input sets keep the cache cold if a call touches ``bytes_per_call``."""
        return min(MAX_SETS, max(2, math.ceil(self.cold_bytes / bytes_per_call)))

    def __call__(self, calls: Sequence[Call]) -> Timing:
        """Returns the time of one call; ``calls`` are alike, each on its own input set."""
        samples = self._time_graph(calls) if self.device.type == "cuda" else self._time_each(calls)
        quartiles = statistics.quantiles(samples, n=4)
        return Timing(statistics.median(samples), quartiles[2] - quartiles[0])

    def host_us(self, call: Call) -> float:
        """Returns the microseconds after which an eager call on a GPU is back: the host's own.

        The median of batches of calls that the launch queue holds, so that none waits for the GPU.
        """
        samples = []
        for _ in range(HOST_BATCHES):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            samples.append((time.perf_counter() - start) * 1e6 / HOST_CALLS)
        torch.cuda.synchronize()
        return statistics.median(samples)

    def _time_graph(self, calls: Sequence[Call]) -> list[float]:
        calls = list(calls) * math.ceil(MIN_GRAPH_CALLS / len(calls))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:3]:  # loads modules, builds plans, warms the allocator
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        estimate_s = self._replay(graph, 2)[-1] * 1e-3
        for _ in range(math.ceil(WARM_UP_S / estimate_s)):
            graph.replay()
        repeats = min(MAX_REPEATS, max(MIN_REPEATS, int(self.budget_s / estimate_s)))
        times_ms = self._replay(graph, repeats)
        graph.reset()
        return [ms * 1e3 / len(calls) for ms in times_ms]

    @staticmethod
    def _replay(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        graph.replay()  # warms up, and lets the host run ahead of the device
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]

    def _time_each(self, calls: Sequence[Call]) -> list[float]:
        for call in calls[:2]:
            call()
        samples: list[float] = []
        end = time.perf_counter() + self.budget_s
        while len(samples) < MIN_REPEATS or (
            time.perf_counter() < end and len(samples) < MAX_CPU_SAMPLES
        ):
            call = calls[(len(samples) + 2) % len(calls)]
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e6)
        return samples


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the device's last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 << 20)


@dataclass(frozen=True)
class Bandwidth:
    """Memory bandwidth in bytes per second, as PyTorch's own kernels reach it on this device."""

    read: float
    copy: float  # bytes read plus bytes written


def measure_bandwidth(timer: Timer, num_bytes: int) -> Bandwidth:
    """Measures the device's bandwidth on buffers of ``num_bytes``.

    Reading: the sum of an int64 tensor of random numbers, the better of one sum and of sums over
    rows of 4096. Copying: ``copy_`` of the same tensor.
    """
    rows = num_bytes // (8 * 4096)
    source = torch.randint(0, 1 << 40, (rows, 4096), dtype=torch.int64, device=timer.device)
    target = torch.empty_like(source)
    reads = (timer([source.sum]), timer([lambda: source.sum(dim=1)]))
    copy = timer([lambda: target.copy_(source)])
    size = rows * 4096 * 8
    return Bandwidth(
        read=size / min(timing.us for timing in reads) * 1e6, copy=2 * size / copy.us * 1e6
    )
