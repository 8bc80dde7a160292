"""The whole decoding step of one layer, and its parts, against dense attention."""

import os
from unittest.mock import patch

from rich.progress import Progress

from .baselines import DENSE, DENSE_MORE
from .buffers import KvPool
from .cases import Case, Shape
from .checks import check_shared_step, check_step
from .grids import Sweep
from .report import Report, Row
from .run import CASE_COLUMNS, Run

PARTS = ("encode_append", "score_select", "gather_attention")
TITLE = "Decoding step of one layer"
COLUMNS = (
    "dtype", *CASE_COLUMNS, "hata_us", *(f"{part}_us" for part in PARTS), *DENSE,
    "floor_us", "read_tbps", *DENSE_MORE, "spread_us", "bytes", "gbps", "percent_of_read",
    "speedup", "portable_us", "host_us", "max_seq_len", "inputs", "kv_cache_dtype",
    "shared_us",
)  # fmt: skip

SHOWN = {
    "shape": "batch x heads x seq_len",
    "top_k": "top_k",
    "codes": "codes",
    "page_size": "page_size",
    "hata_us": "hata us",
    "spread_us": "spread",
    "floor_us": "floor",
    "percent_of_read": "% read",
    "encode_append_us": "encode, append",
    "score_select_us": "score, select",
    "gather_attention_us": "gather",
    "shared_us": "shared",
    "portable_us": "portable",
    "host_us": "host",
    "fa2_us": "FA2",
    "cudnn_us": "cuDNN",
    "flashinfer_us": "FI",
    "flashinfer_tc_us": "FI tc",
    "flash_attn2_us": "flash-attn 2",
    "flash_attn3_us": "flash-attn 3",
    "sdpa_us": "SDPA",
    "speedup": "speedup",
}


def bench(run: Run, report: Report, progress: Progress) -> None:
    """Adds one row per shape and code setting; what several grids share is measured once."""
    total = sum(len(sweep.shapes) for sweep in run.plan.sweeps)
    task = progress.add_task("decode", total=total)
    speedups: dict[Case, float] = {}  # 0: no baseline, or failed
    for sweep in run.plan.sweeps:
        for shape in sweep.shapes:
            progress.update(task, description=f"decode: {shape}", advance=1)
            with run.case(shape):
                bench_shape(run, report, sweep, shape, speedups)
            won = all(speedups.get(Case(shape, config), 0) > 1 for config in sweep.configs)
            if sweep.until_faster and won:
                break
    progress.remove_task(task)


def bench_shape(
    run: Run, report: Report, sweep: Sweep, shape: Shape, speedups: dict[Case, float]
) -> None:
    cases = [Case(shape, config) for config in sweep.configs]
    cases = [case for case in cases if case not in speedups]
    if not cases:
        return
    kv = run.kv_pool(shape)
    dense = run.dense(kv)
    for case in cases:
        speedups[case] = 0.0
        with run.case(case):
            row = step_row(run, kv, case)
            row |= dense
            if dense:
                speedups[case] = min(dense.values()) / row["hata_us"]
                row["speedup"] = speedups[case]
            report.add(row)


def step_row(run: Run, kv: KvPool, case: Case) -> Row:
    """Times one step and its parts.

    The floor counts what no step can avoid reading, every code and norm and the selected rows.
    ``portable_us`` is the step as GPUs other than Hopper run it, ``host_us`` what an eager call
    takes the host. ``shared_us`` is the step of a layer that attends to what another has selected:
    appending without codes, and attention over the selection.
    """
    pool = run.code_pool(kv, case)
    check_step(pool)
    step = run.timer(pool.calls("decode_step"))
    row = run.row(case.shape, case.config, pool.page_size, case.shape.q_len)
    row |= run.measured(step, case.num_bytes) | {"hata_us": step.us}
    if run.timer.device.type == "cuda":
        row["host_us"] = run.timer.host_us(pool.prepared_step(0))
        with patch.dict(os.environ, HATA_SCORE_SELECT="two_kernels"):
            row["portable_us"] = run.timer(pool.calls("decode_step")).us
    check_shared_step(pool)
    row["shared_us"] = run.timer(pool.calls("shared_step")).us
    return row | {f"{part}_us": run.timer(pool.calls(part)).us for part in PARTS}
