"""What the benchmarks of one run share: the device, its clock and bandwidth, and their columns."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from rich.console import Console

from .buffers import CodePool, KvPool
from .cases import CONTIGUOUS, CodeConfig, Plan, Shape
from .report import Row
from .timing import Bandwidth, Timer, Timing


def first_line(error: BaseException) -> str:
    """Returns an error's message without the stack traces that some libraries put into it."""
    return (str(error).strip() or repr(error)).splitlines()[0]


@dataclass
class Run:
    """One run of ``hata bench``."""

    device: torch.device
    dtype: torch.dtype
    plan: Plan
    timer: Timer
    bandwidth: Bandwidth
    memory_limit: int
    console: Console
    errors: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Prints one line beside the progress bar."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def case(self, name: object) -> Iterator[None]:
        """Reports a case that fails, and lets the others go on; the run then fails at its end."""
        try:
            yield
        except Exception as error:
            self.errors.append(f"{name}: {first_line(error)}")
            self.note(f"failed: {self.errors[-1]}")

    def kv_pool(self, shape: Shape) -> KvPool:
        return KvPool(shape, self.dtype, self.timer, self.memory_limit)

    def code_pool(self, kv: KvPool, config: CodeConfig, page_size: int = CONTIGUOUS) -> CodePool:
        return CodePool(kv, config, self.timer, page_size)

    def layouts(self, shape: Shape) -> list[tuple[CodeConfig, int]]:
        """Returns the code settings and page sizes to measure at one shape."""
        layouts = [(config, CONTIGUOUS) for config in self.plan.configs]
        if shape in self.plan.paged:
            layouts.append((self.plan.configs[1], 16))
        return layouts

    def row(
        self, shape: Shape, config: CodeConfig | None, page_size: int | None, q_len: int = 1
    ) -> Row:
        """Returns the columns that describe a case; without a config no code is involved."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": shape.batch,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "seq_len": shape.seq_len,
            "top_k": shape.top_k,
            "num_bits": config and config.num_bits,
            "query_bits": config and config.query_bits,
            "key_norms": config and config.key_norms,
            "q_len": q_len,
            "page_size": page_size,
            "shape": str(shape),
            "codes": config and config.name,
        }

    def measured(self, timing: Timing, num_bytes: int) -> Row:
        """Returns the columns of a time: how far it is from moving ``num_bytes`` at full speed."""
        bytes_per_second = num_bytes / timing.us * 1e6
        return {
            "spread_us": timing.spread_us,
            "bytes": num_bytes,
            "floor_us": num_bytes / self.bandwidth.read * 1e6,
            "gbps": bytes_per_second / 1e9,
            "percent_of_read": 100 * bytes_per_second / self.bandwidth.read,
            "read_tbps": self.bandwidth.read / 1e12,
        }

    def op_row(
        self,
        op: str,
        shape: Shape,
        config: CodeConfig | None,
        page_size: int | None,
        timing: Timing,
        num_bytes: int,
        *,
        q_len: int = 1,
        baseline: tuple[str, Timing] | None = None,
    ) -> Row:
        """Returns the row of one operator; ``num_bytes`` are what it must read and write."""
        row = self.row(shape, config, page_size, q_len) | self.measured(timing, num_bytes)
        row |= {"op": op, "us": timing.us, "copy_tbps": self.bandwidth.copy / 1e12}
        row["percent_of_copy"] = 100 * num_bytes / timing.us * 1e6 / self.bandwidth.copy
        if baseline is not None:
            name, baseline_timing = baseline
            row |= {"baseline": name, "baseline_us": baseline_timing.us}
            row["speedup"] = baseline_timing.us / timing.us
        return row
