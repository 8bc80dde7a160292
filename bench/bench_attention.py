"""gather_attention against PyTorch over copied rows, dense_attention, merge_attention_states."""

import functools

import torch
from torch import Tensor

import hata
from hata import reference

from .baselines import Attend, sdpa
from .buffers import CodePool, cyclic
from .checks import check_dense, check_gathered, require_close
from .report import Row
from .run import Run


def gather_attention(run: Run, pool: CodePool) -> Row:
    check_gathered(pool, pool.gather_attention(0)[0], "gather_attention")
    shape = pool.kv.shape
    num_bytes = shape.row_bytes + pool.indices[0].nbytes + 2 * pool.out.nbytes
    timing = run.timer(pool.calls("gather_attention"))
    rivals = {}
    if pool.page_size == shape.seq_len:
        attend = gather_then_sdpa(pool)
        check_gathered(pool, attend(0), "SDPA over copied rows")
        num_sets = run.timer.num_sets(shape.row_bytes)
        calls = [functools.partial(attend, i) for i in range(num_sets)]
        rivals["rows copied, SDPA"] = run.timer(calls).us
    return run.op_row(
        "gather_attention", shape, None, pool.page_size, timing, num_bytes, rivals=rivals
    )


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


def dense_attention(run: Run, pool: CodePool) -> Row:
    check_dense(pool.kv, pool.dense_attention(0)[0], "dense_attention", pool)
    shape = pool.kv.shape
    timing = run.timer(pool.calls("dense_attention"))
    num_bytes = shape.kv_bytes + 2 * pool.out.nbytes
    rivals = {name.removesuffix("_us"): us for name, us in run.dense(pool.kv).items()}
    return run.op_row(
        "dense_attention", shape, None, pool.page_size, timing, num_bytes, rivals=rivals
    )


def merge_attention_states(run: Run, pool: CodePool) -> Row:
    shape = pool.kv.shape
    state_bytes = pool.out.nbytes + pool.lse.nbytes
    num_sets = run.timer.num_sets(3 * state_bytes)
    outs = [pool.out.new_empty(num_sets, *pool.out.shape).normal_() for _ in range(2)]
    lses = [pool.lse.new_empty(num_sets, *pool.lse.shape).normal_() for _ in range(2)]

    def merge(i: int) -> tuple[Tensor, Tensor]:
        return hata.merge_attention_states(outs[0][i], lses[0][i], outs[1][i], lses[1][i])

    out, lse = merge(0)
    states = (outs[0][0].float(), lses[0][0], outs[1][0].float(), lses[1][0])
    expected, expected_lse = reference.merge_attention_states(*states)
    require_close(out, expected.float(), "merge_attention_states equals the reference")
    require_close(lse, expected_lse.float(), "merge_attention_states equals the reference's lse")
    timing = run.timer([functools.partial(merge, i) for i in range(num_sets)])
    return run.op_row("merge_attention_states", shape, None, None, timing, 3 * state_bytes)
