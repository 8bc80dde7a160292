"""The whole decoding step of one layer, and its parts, against dense attention."""

from rich.progress import Progress, TaskID

from .baselines import DENSE, DENSE_MORE, measure_dense
from .buffers import KvPool
from .cases import CodeConfig, Shape
from .checks import check_step
from .report import Report, Row
from .run import Run

COLUMNS = (
    "dtype",
    "batch",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "seq_len",
    "top_k",
    "num_bits",
    "query_bits",
    "key_norms",
    "q_len",
    "page_size",
    "hata_us",
    "encode_append_us",
    "score_select_us",
    "gather_attention_us",
    *DENSE,
    "floor_us",
    "read_tbps",
    *DENSE_MORE,
    "spread_us",
    "bytes",
    "gbps",
    "percent_of_read",
    "speedup",
)

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
    "fa2_us": "FA2",
    "cudnn_us": "cuDNN",
    "flashinfer_us": "FI",
    "flashinfer_tc_us": "FI tc",
    "flash_attn2_us": "flash-attn 2",
    "flash_attn3_us": "flash-attn 3",
    "sdpa_us": "SDPA",
    "speedup": "speedup",
}


def bench_decode(run: Run, report: Report, progress: Progress) -> None:
    """Adds one row per shape, code setting and page size."""
    task = progress.add_task("decode", total=sum(len(run.layouts(s)) for s in run.plan.shapes))
    for shape in run.plan.shapes:
        with run.case(shape):
            bench_shape(run, report, progress, task, shape)
    progress.remove_task(task)


def bench_shape(run: Run, report: Report, progress: Progress, task: TaskID, shape: Shape) -> None:
    progress.update(task, description=f"decode: {shape}, dense")
    kv = run.kv_pool(shape)
    dense = measure_dense(kv, run.timer, run.note)
    for config, page_size in run.layouts(shape):
        progress.update(task, description=f"decode: {shape}, {config}")
        with run.case(f"{shape}, {config}"):
            report.add(step_row(run, kv, config, page_size, dense))
        progress.advance(task)


def step_row(
    run: Run, kv: KvPool, config: CodeConfig, page_size: int, dense: dict[str, float]
) -> Row:
    """Times one step and its parts.

    The floor counts what no step can avoid reading, every code and norm and the selected rows;
    the speedup is against the fastest dense baseline.
    """
    pool = run.code_pool(kv, config, page_size)
    check_step(pool)
    step = run.timer(pool.calls("decode_step"))
    parts = {
        f"{part}_us": run.timer(pool.calls(part)).us
        for part in ("encode_append", "score_select", "gather_attention")
    }
    num_bytes = config.code_bytes(kv.shape) + kv.shape.row_bytes(kv.dtype)
    row = run.row(kv.shape, config, pool.page_size) | run.measured(step, num_bytes)
    row |= {"hata_us": step.us, **parts, **dense}
    if dense:
        row["speedup"] = min(dense.values()) / step.us
    return row
