"""The rivals' way: a generic top-k over scores in memory, and attention over copied rows."""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from .baselines import Attend, Baselines, sdpa
from .buffers import CodePool, cyclic
from .checks import require
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


def gather_then_sdpa(pool: CodePool) -> Attend:
    """Attention over the selection with PyTorch alone: copies the rows, then SDPA over the copy.

    Every index of the contiguous cache's selection must be a position.
    """
    kv, shape = pool.kv, pool.kv.shape
    rows = pool.indices[:, :, 0].long()  # [num_sets, batch, num_kv_heads, top_k]
    sequences = torch.arange(shape.batch, device=rows.device)[:, None, None]
    heads = torch.arange(shape.num_kv_heads, device=rows.device)[:, None]

    def attend(i: int) -> Tensor:
        chosen = (sequences, cyclic(rows, i), heads)
        k = cyclic(kv.k_caches, i)[chosen]  # [batch, num_kv_heads, top_k, head_dim]
        v = cyclic(kv.v_caches, i)[chosen]
        q = cyclic(kv.qs, i).view(shape.batch, shape.num_kv_heads, shape.group, shape.head_dim)
        return sdpa(q, k, v, None, enable_gqa=False)

    return attend
