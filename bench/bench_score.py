"""hamming_score, select_topk and score_select, against generic top-k on the same scores."""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import hata
from hata import reference

from .baselines import Baselines
from .buffers import CodePool, cyclic
from .checks import check_selection, require, sampled_pairs
from .report import Row
from .run import Run
from .timing import Timing

# Scores [rows, seq_len] and top_k -> values and indices, in any order.
TopK = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def topk_ways(run: Run) -> dict[str, TopK]:
    """Returns the generic top-k selections that this machine has, by name."""
    if run.baselines is Baselines.NONE:
        return {}
    ways: dict[str, TopK] = {"torch.topk": functools.partial(torch.topk, sorted=False)}
    others = run.baselines is Baselines.ALL and run.timer.device.type == "cuda"
    if others and importlib.util.find_spec("flashinfer"):
        ways["flashinfer.top_k"] = flashinfer_topk
    return ways


def flashinfer_topk(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    import flashinfer

    return flashinfer.top_k(scores, top_k)


def time_topk(run: Run, scores: Tensor, top_k: int) -> dict[str, float]:
    """Times every way on float16 copies of scores ``[num_sets, batch, 1, num_kv_heads, seq_len]``.

    hata's integer scores are exact in float16; FlashInfer takes no integers, and half the bytes
    are faster for torch.topk too. The copies are made before the clock starts.
    """
    rows = scores.flatten(1, -2).to(torch.float16)
    shape = list(rows[0].shape)
    times = {}
    for name, topk in topk_ways(run).items():

        def measure(name: str = name, topk: TopK = topk) -> Timing:
            require_best(topk(rows[0], top_k)[0], rows[0], name)
            return run.timer([functools.partial(topk, each, top_k) for each in rows])

        times[name] = run.attempt(name, shape, measure)
    return {name: timing.us for name, timing in times.items() if timing is not None}


def require_best(values: Tensor, rows: Tensor, name: str) -> None:
    """Requires that the values, in any order, are the largest of their rows."""
    best = torch.topk(rows, values.shape[-1]).values
    same = torch.equal(values.sort(-1, descending=True).values, best)
    require(same, f"{name} finds the largest scores")


def score(pool: CodePool, i: int) -> Tensor:
    """Returns ``[batch, 1, num_kv_heads, seq_len]``, float16 with norms, else int32."""
    return hata.hamming_score(
        cyclic(pool.planes, i),
        cyclic(pool.codes, i),
        pool.norm_cache(i),
        pool.block_table,
        pool.kv.cache_seqlens,
        weight_sum=pool.weight_sum,
        max_seq_len=pool.kv.shape.seq_len,
    )


def check_scores(pool: CodePool, scores: Tensor) -> None:
    """Requires that scores ``[batch, 1, num_kv_heads, seq_len]`` are set 0's."""
    norms = pool.norm_cache(0)
    for b, h in sampled_pairs(pool.kv):
        expected = reference.hamming_score(
            pool.planes[0][b : b + 1, :, h : h + 1],
            pool.codes[0][:, h : h + 1],
            None if norms is None else norms[:, h : h + 1],
            pool.block_table[b : b + 1],
            pool.kv.cache_seqlens[b : b + 1],
            weight_sum=pool.weight_sum,
            max_seq_len=pool.kv.shape.seq_len,
        )
        same = torch.equal(scores[b, :, h], expected[0, :, 0])
        require(same, "hamming_score equals the reference")


def hamming_score(run: Run, pool: CodePool) -> Row:
    scores = score(pool, 0)
    check_scores(pool, scores)
    shape, config = pool.kv.shape, pool.config
    num_bytes = config.code_bytes(shape) + pool.planes[0].nbytes + scores.nbytes
    sets = range(run.timer.num_sets(config.code_bytes(shape)))
    timing = run.timer([functools.partial(score, pool, i) for i in sets])
    return run.op_row("hamming_score", shape, config, pool.page_size, timing, num_bytes)


def score_select(run: Run, pool: CodePool) -> Row:
    """Against scores in memory and a generic top-k, which breaks ties and orders as it likes."""
    check_selection(pool, pool.score_select(0))
    shape, config = pool.kv.shape, pool.config
    num_bytes = config.code_bytes(shape) + pool.planes[0].nbytes + pool.indices[0].nbytes
    timing = run.timer(pool.calls("score_select"))
    sets = range(run.timer.num_sets(config.code_bytes(shape)))
    rivals = {}
    for name, topk in topk_ways(run).items():

        def score_topk(i: int, topk: TopK = topk) -> None:
            topk(score(pool, i).flatten(0, -2).to(torch.float16), shape.top_k)

        calls = [functools.partial(score_topk, i) for i in sets]
        timed = run.attempt(name, shape, functools.partial(run.timer, calls))
        if timed is not None:
            rivals[f"hamming_score, {name}"] = timed.us
    return run.op_row(
        "score_select", shape, config, pool.page_size, timing, num_bytes, rivals=rivals
    )


def select_topk(run: Run, pool: CodePool) -> Row:
    """Without sink and recent positions, so that a generic top-k selects the same scores."""
    shape, config = pool.kv.shape, pool.config
    num_sets = run.timer.num_sets(score(pool, 0).nbytes)
    pooled = torch.stack([score(pool, i) for i in range(num_sets)])

    def select(i: int) -> tuple[Tensor, Tensor]:
        return hata.select_topk(pooled[i], pool.kv.cache_seqlens, top_k=shape.top_k)

    indices, _ = select(0)
    require_best(pooled[0].gather(-1, indices.long()), pooled[0], "select_topk")
    timing = run.timer([functools.partial(select, i) for i in range(num_sets)])
    num_bytes = pooled[0].nbytes + indices.nbytes
    rivals = time_topk(run, pooled, shape.top_k)
    return run.op_row(
        "select_topk", shape, config, pool.page_size, timing, num_bytes, rivals=rivals
    )
