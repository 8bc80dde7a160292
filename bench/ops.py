"""Each operator alone, against the best that PyTorch has for the same work."""

from collections.abc import Callable

from rich.progress import Progress, TaskID

from .baselines import measure_prefill
from .bench_attention import dense_attention, gather_attention, merge_attention_states
from .bench_encode import (
    Prompt,
    cache_append,
    cache_append_prompt,
    encode_query,
    hash_encode_prompt,
)
from .bench_score import hamming_score, score_select, select_topk
from .buffers import CodePool
from .cases import CONTIGUOUS, Case, Shape
from .report import Report, Row
from .run import CASE_COLUMNS, Run

TITLE = "Operators alone"
COLUMNS = (
    "dtype", "op", *CASE_COLUMNS, "us", "spread_us", "bytes", "floor_us", "gbps",
    "percent_of_read", "percent_of_copy", "baseline", "baseline_us", "speedup", "read_tbps",
    "copy_tbps", "torch_us", "flashinfer_us", "prefill_us", "percent_of_prefill", "max_seq_len",
    "inputs",
)  # fmt: skip

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
    "percent_of_copy": "% copy",
    "percent_of_prefill": "% prefill",
}

OpBench = Callable[[Run, CodePool], Row]

STEP_OPS: dict[str, OpBench] = {
    "encode_query": encode_query,
    "cache_append": cache_append,
    "hamming_score": hamming_score,
    "select_topk": select_topk,
    "score_select": score_select,
    "gather_attention": gather_attention,
    "dense_attention": dense_attention,
    "merge_attention_states": merge_attention_states,
}
OPS = ("prompt", *STEP_OPS)  # "prompt": hash_encode and cache_append of a whole prompt


def benches(run: Run, case: Case) -> list[OpBench]:
    """Returns what to measure in one layout: nothing twice that does not depend on it."""
    chosen = dict(STEP_OPS)
    paged, first = case.page_size != CONTIGUOUS, case.config == run.plan.configs[0]
    if paged:
        del chosen["encode_query"]
    if paged or case.config not in run.plan.configs[:2]:  # float16 scores, and int32
        del chosen["select_topk"]
    if not paged and not first:
        del chosen["gather_attention"], chosen["dense_attention"]
    if paged or not first:
        del chosen["merge_attention_states"]
    return [measure for name, measure in chosen.items() if name in run.ops]


def bench(run: Run, report: Report, progress: Progress) -> None:
    """Adds one row per operator, shape and code setting that it depends on."""
    total = 1 + sum(len(run.plan.layouts(shape)) for shape in run.plan.shapes)
    task = progress.add_task("operators", total=total)
    if "prompt" in run.ops:
        bench_prompt(run, report)
    progress.advance(task)
    for shape in run.plan.shapes if set(run.ops) & STEP_OPS.keys() else ():
        with run.case(shape):
            bench_shape(run, report, progress, task, shape)
    progress.remove_task(task)


def bench_prompt(run: Run, report: Report) -> None:
    prefill_us = None
    for config in run.plan.configs:
        with run.case(f"prompt of {run.plan.prompt}, {config}"):
            prompt = Prompt(run, config)
            if prefill_us is None:
                prefill_us = measure_prefill(
                    prompt.shape, prompt.keys, prompt.values, run.timer, run.attempt
                )
            report.add(hash_encode_prompt(run, prompt))
            report.add(cache_append_prompt(run, prompt, prefill_us))


def bench_shape(run: Run, report: Report, progress: Progress, task: TaskID, shape: Shape) -> None:
    kv = run.kv_pool(shape)
    for case in run.plan.layouts(shape):
        progress.update(task, description=f"operators: {case}", advance=1)
        chosen = benches(run, case)
        if not chosen:
            continue
        pool = run.code_pool(kv, case)
        for measure in chosen:
            with run.case(f"{measure.__name__}: {case}"):
                report.add(measure(run, pool))
