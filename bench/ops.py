"""Each operator alone, against the best that PyTorch has for the same work."""

from collections.abc import Callable

from rich.progress import Progress, TaskID

from .bench_attention import gather_attention, merge_attention_states
from .bench_encode import (
    Prompt,
    cache_append,
    cache_append_prompt,
    encode_query,
    hash_encode_prompt,
)
from .bench_score import hamming_score, score_select, select_topk
from .buffers import CodePool
from .cases import CONTIGUOUS, CodeConfig, Shape
from .report import Report, Row
from .run import Run

COLUMNS = (
    "dtype",
    "op",
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
    "us",
    "spread_us",
    "bytes",
    "floor_us",
    "gbps",
    "percent_of_read",
    "percent_of_copy",
    "baseline",
    "baseline_us",
    "speedup",
    "read_tbps",
    "copy_tbps",
)

SHOWN = {
    "op": "operator",
    "shape": "batch x heads x seq_len",
    "q_len": "q_len",
    "codes": "codes",
    "page_size": "page_size",
    "us": "us",
    "spread_us": "spread",
    "floor_us": "floor",
    "gbps": "GB/s",
    "percent_of_read": "% read",
    "baseline": "baseline",
    "baseline_us": "its us",
    "speedup": "speedup",
}

OpBench = Callable[[Run, CodePool], Row]


def benches(run: Run, config: CodeConfig, page_size: int) -> list[OpBench]:
    """Returns what to measure in one layout: nothing twice that does not depend on it."""
    chosen: list[OpBench] = [cache_append, hamming_score, score_select]
    if page_size != CONTIGUOUS:
        return [*chosen, gather_attention]
    chosen.insert(0, encode_query)
    if config in run.plan.configs[:2]:  # one with float16 scores, one with int32
        chosen.append(select_topk)
    if config == run.plan.configs[0]:
        chosen += [gather_attention, merge_attention_states]
    return chosen


def bench_ops(run: Run, report: Report, progress: Progress) -> None:
    """Adds one row per operator, shape and code setting that it depends on."""
    total = 1 + sum(len(run.layouts(shape)) for shape in run.plan.shapes)
    task = progress.add_task("operators", total=total)
    bench_prompt(run, report)
    progress.advance(task)
    for shape in run.plan.shapes:
        with run.case(shape):
            bench_shape(run, report, progress, task, shape)
    progress.remove_task(task)


def bench_prompt(run: Run, report: Report) -> None:
    for config in run.plan.configs:
        with run.case(f"prompt of {run.plan.prompt}, {config}"):
            prompt = Prompt(run, config)
            report.add(hash_encode_prompt(run, prompt))
            report.add(cache_append_prompt(run, prompt))


def bench_shape(run: Run, report: Report, progress: Progress, task: TaskID, shape: Shape) -> None:
    kv = run.kv_pool(shape)
    for config, page_size in run.layouts(shape):
        progress.update(task, description=f"operators: {shape}, {config}")
        pool = run.code_pool(kv, config, page_size)
        for bench in benches(run, config, page_size):
            with run.case(f"{bench.__name__}: {shape}, {config}"):
                report.add(bench(run, pool))
        progress.advance(task)
