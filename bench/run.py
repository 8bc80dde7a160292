"""What the benchmarks of one run share: the device, its clock and bandwidth, and their columns."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from rich.console import Console

from .baselines import Baselines, measure_dense
from .buffers import CodePool, KvPool
from .cases import PAPER_BUDGET, Case, CodeConfig, Shape, name_of
from .grids import Plan
from .inputs import Captured
from .report import Row
from .timing import Bandwidth, Timer, Timing, first_line

MAX_FAILURE_S = 10.0
# Of a case, in the order in which the CSV files have them.
CASE_COLUMNS = (
    "batch", "num_heads", "num_kv_heads", "head_dim", "seq_len", "top_k", "num_bits", "query_bits",
    "key_norms", "q_len", "page_size",
)  # fmt: skip


@dataclass
class Run:
    """One run of ``python -m bench``."""

    plan: Plan
    timer: Timer
    bandwidth: Bandwidth
    memory_limit: int
    console: Console
    baselines: Baselines = Baselines.ALL
    captured: Captured | None = None
    ops: tuple[str, ...] = ()  # of the operators alone
    errors: list[str] = field(default_factory=list)
    _dense: dict[Shape, dict[str, float]] = field(default_factory=dict)
    _given_up: set[str] = field(default_factory=set)

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

    def attempt(self, rival: str, where: object, measure: Callable[[], Timing]) -> Timing | None:
        """Measures a rival that may not run here: one line says so, the run does not fail for it.

        One whose failure took long, which a compilation does, is not tried again.
        """
        if rival in self._given_up:
            return None
        start = time.perf_counter()
        try:
            return measure()
        except Exception as error:  # not for this card or shape, or its kernels do not compile
            self.note(f"no {rival} for {where}: {first_line(error)}")
            if time.perf_counter() - start > MAX_FAILURE_S:
                self._given_up.add(rival)
                self.note(f"no {rival} any more: its failure took too long")
            return None

    def kv_pool(self, shape: Shape) -> KvPool:
        return KvPool(shape, self.timer, self.memory_limit, self.captured)

    def code_pool(self, kv: KvPool, case: Case) -> CodePool:
        return CodePool(kv, case, self.timer)

    def dense(self, kv: KvPool) -> dict[str, float]:
        """Returns ``measure_dense`` of a shape, measured once in a run: it has no budget."""
        shape = replace(kv.shape, budget=PAPER_BUDGET)
        if shape not in self._dense:
            self._dense[shape] = measure_dense(kv, self.timer, self.baselines, self.attempt)
        return self._dense[shape]

    def row(
        self, shape: Shape, config: CodeConfig | None, page_size: int | None, q_len: int
    ) -> Row:
        """Returns the columns that describe a case; without a config no code is involved."""
        return {
            "dtype": name_of(shape.dtype),
            "kv_cache_dtype": name_of(shape.kv_cache_dtype or shape.dtype),
            **{name: getattr(shape, name) for name in CASE_COLUMNS[:6]},
            "max_seq_len": shape.max_seq_len,
            "num_bits": config and config.num_bits,
            "query_bits": config and config.query_bits,
            "key_norms": config and config.key_norms,
            "q_len": q_len,
            "page_size": page_size,
            "inputs": "random" if self.captured is None else "captured",
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
        rivals: dict[str, float] | None = None,
    ) -> Row:
        """Returns the row of one operator; ``num_bytes`` are what it must read and write.

        Rivals do the same work without hata, microseconds by name; the fastest is the row's
        baseline.
        """
        row = self.row(shape, config, page_size, q_len) | self.measured(timing, num_bytes)
        row |= {"op": op, "us": timing.us, "copy_tbps": self.bandwidth.copy / 1e12}
        row["percent_of_copy"] = 100 * num_bytes / timing.us * 1e6 / self.bandwidth.copy
        if rivals:
            best = min(rivals, key=lambda name: rivals[name])
            row |= {"baseline": best, "baseline_us": rivals[best]}
            row |= {"speedup": rivals[best] / timing.us}
            for name, us in rivals.items():
                column = "flashinfer_us" if "flashinfer" in name else "torch_us"
                row[column] = min(us, row.get(column, us))
        return row
