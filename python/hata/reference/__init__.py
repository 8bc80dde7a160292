"""Every operator in plain PyTorch: slow, obvious, and what the kernels must equal.

Shares no code with ``hata.ops``; signatures are the same, without buffers. Arguments and results
are described there.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from hata.reference.bits import pack_bits, pack_planes, quantize, unpack_bits, unpack_planes
from hata.reference.float8 import as_rows, per_head

MAX_NORM = 65504.0  # the largest float16
INT32_MIN = -(2**31)


def hash_encode(
    keys: Tensor, key_weights: Tensor, *, key_norms: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Packed signs of the keys' projections, and the keys' norms."""
    z = torch.einsum("bshd,hdi->bhsi", keys.double(), key_weights.double())
    codes = pack_bits(z > 0)  # [batch, num_kv_heads, seq_len, num_words]
    norms = keys.double().norm(dim=-1).clamp(max=MAX_NORM).half()  # [batch, seq_len, num_kv_heads]
    return (codes, norms.transpose(1, 2).contiguous()) if key_norms else codes


def encode_query(q: Tensor, query_weights: Tensor, *, query_bits: int) -> Tensor:
    """The bit planes of each query token and KV head's integer vector."""
    num_kv_heads = query_weights.shape[0]
    groups = q.unflatten(2, (num_kv_heads, -1))  # [batch, q_len, num_kv_heads, group, head_dim]
    if query_bits == 1:
        z = torch.einsum("bjhgd,hdi->bjhgi", groups.double(), query_weights.double())
        weight_sum = groups.shape[3]
        level = (z > 0).sum(3)  # c = 2 level - group: each head adds +1 or -1
    else:
        z = torch.einsum("bjhgd,hdi->bjhi", groups.double(), query_weights.double()).float()
        weight_sum = 2**query_bits - 1
        level = quantize(z, weight_sum)
    return pack_planes(level, weight_sum)


def cache_append(
    k: Tensor,
    v: Tensor,
    key_weights: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor | None,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    new_seqlens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes k, v, codes and norms of each new token at its position."""
    batch, q_len, _, _ = k.shape
    page_size = k_cache.shape[1]
    if key_weights is not None:
        codes, norms = hash_encode(k, key_weights, key_norms=True)
    for b in range(batch):
        num_new = q_len if new_seqlens is None else int(new_seqlens[b])
        for j in range(q_len - num_new, q_len):
            position = int(cache_seqlens[b]) - q_len + j
            if position < 0:
                continue
            page, row = int(block_table[b, position // page_size]), position % page_size
            k_cache[page, row] = as_rows(k[b, j], k_cache.dtype, k_scale)
            v_cache[page, row] = as_rows(v[b, j], v_cache.dtype, v_scale)
            if code_cache is not None:
                code_cache[page, :, row] = codes[b, :, j]
            if norm_cache is not None:
                norm_cache[page, :, row] = norms[b, :, j]


def cache_write(
    k: Tensor,
    v: Tensor,
    key_weights: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes k, v, codes and norms of each token to its row."""
    codes, norms = hash_encode(k[None], key_weights, key_norms=True)
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    page, row = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[page, row] = as_rows(k[written], k_cache.dtype, k_scale)
    v_cache[page, row] = as_rows(v[written], v_cache.dtype, v_scale)
    code_cache[page, :, row] = codes[0].transpose(0, 1)[written]
    if norm_cache is not None:
        norm_cache[page, :, row] = norms[0].T[written]


def hamming_score(
    planes: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    weight_sum: int,
    max_seq_len: int,
) -> Tensor:
    """The integer vectors of the planes times the signs of every visible key's code."""
    batch, q_len, num_kv_heads, _, num_words = planes.shape
    num_bits = num_words * 32
    shape = (batch, q_len, num_kv_heads, max_seq_len)
    scores = torch.full(shape, INT32_MIN, dtype=torch.int32, device=planes.device)
    if norm_cache is not None:
        scores = torch.full(shape, -torch.inf, dtype=torch.float16, device=planes.device)
    c = unpack_planes(planes, weight_sum)  # [batch, q_len, num_kv_heads, num_bits]
    for b in range(batch):
        seq_len = int(cache_seqlens[b])
        page, row = locate(block_table[b], code_cache.shape[2], seq_len)
        signs = 2 * unpack_bits(code_cache[page, :, row]) - 1  # [seq_len, num_kv_heads, num_bits]
        score = (c[b, :, None] * signs).sum(-1, dtype=torch.int32)  # [q_len, seq_len, kv_heads]
        if norm_cache is not None:
            score = scale_by_norm(score, num_bits, norm_cache[page, :, row])
        for j in range(q_len):
            visible = min(max(seq_len - q_len + j + 1, 0), max_seq_len)
            scores[b, j, :, :visible] = score[j, :visible].T
    return scores


def scale_by_norm(score: Tensor, num_bits: int, norms: Tensor) -> Tensor:
    """Integer scores times their keys' float16 norms: in float32, rounded to float16 once."""
    # By a tensor: CUDA divides by a number through its reciprocal, which rounds otherwise.
    divisor = torch.full_like(score, num_bits, dtype=torch.float32)
    return (score.float() / divisor * norms.float()).half()


def select_topk(
    scores: Tensor,
    cache_seqlens: Tensor,
    *,
    top_k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    return_cut: bool = False,
) -> tuple[Tensor, ...]:
    """The visible positions with the highest scores, by a stable sort."""
    batch, q_len, num_kv_heads, max_seq_len = scores.shape
    width = min(top_k, max_seq_len)
    indices = torch.full((batch, q_len, num_kv_heads, width), -1, dtype=torch.int32)
    num_selected = torch.zeros(batch, q_len, num_kv_heads, dtype=torch.int32)
    lowest = -torch.inf if scores.is_floating_point() else INT32_MIN
    last_score = torch.full_like(num_selected, lowest, dtype=scores.dtype)
    num_ties = torch.zeros_like(num_selected)
    values = scores.cpu().double()
    for b in range(batch):
        for j in range(q_len):
            visible = max(int(cache_seqlens[b]) - q_len + j + 1, 0)
            t = torch.arange(visible)
            always = (t < num_sink) | (t >= visible - num_recent)
            budget = top_k
            if top_k_share is not None:
                units = math.floor(top_k_share * 2**32)
                least = max(num_sink + num_recent, 1) if min_top_k is None else min_top_k
                budget = min(max(-(-visible * units // 2**32), least), top_k)
            for h in range(num_kv_heads):
                row = values[b, j, h, :visible]
                order = t.flip(0)  # the most recent first, then by score, NaN last, always first
                keys = (-row.nan_to_num(nan=-torch.inf, posinf=torch.inf), row.isnan(), ~always)
                for key in keys:
                    order = order[key[order].argsort(stable=True)]
                chosen = order[:budget].sort().values
                indices[b, j, h, : len(chosen)] = chosen
                num_selected[b, j, h] = len(chosen)
                if always.sum() < budget < visible:
                    last = row[order[budget - 1]]
                    ties = row.isnan() if last.isnan() else row == last
                    last_score[b, j, h], num_ties[b, j, h] = last, (ties & ~always).sum()
    selected = (indices, num_selected, last_score, num_ties)
    return tuple(t.to(scores.device) for t in selected[: 4 if return_cut else 2])


def score_select(
    planes: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    weight_sum: int,
    top_k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    return_cut: bool = False,
) -> tuple[Tensor, ...]:
    """select_topk of hamming_score."""
    scores = hamming_score(
        planes,
        code_cache,
        norm_cache,
        block_table,
        cache_seqlens,
        weight_sum=weight_sum,
        max_seq_len=block_table.shape[1] * code_cache.shape[2],
    )
    budget: dict[str, Any] = {"top_k": top_k, "num_sink": num_sink, "num_recent": num_recent}
    budget |= {"top_k_share": top_k_share, "min_top_k": min_top_k, "return_cut": return_cut}
    return select_topk(scores, cache_seqlens, **budget)


def fetch_rows(
    indices: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    slot_of_row: Tensor,
    position_of_slot: Tensor,
    referenced: Tensor,
    hand: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Looks up each list's rows, then lets a clock's hand go round for those that are missing."""
    slots, missing = torch.full_like(indices, -1), torch.full_like(indices, -1)
    num_missing = torch.zeros_like(hand)
    page_size, num_slots = k_cache.shape[1], k_rows.shape[1]
    for b, h in itertools.product(range(len(indices)), range(indices.shape[2])):
        pages, rows = locate(block_table[b], page_size, int(cache_seqlens[b]))
        held, marks = position_of_slot[b, h], referenced[b, h]  # views
        where = {int(t): slot for slot, t in enumerate(held.tolist()) if t >= 0}
        wanted = [(i, t) for i, t in enumerate(indices[b, 0, h].tolist()) if 0 <= t < len(pages)]
        hits = {i: where[t] for i, t in wanted if t in where}
        in_use = set(hits.values())
        for i, slot in hits.items():
            slots[b, 0, h, i], marks[slot] = slot, 1
        for m, (i, t) in enumerate((i, t) for i, t in wanted if i not in hits):
            while (slot := int(hand[b, h])) in in_use or marks[slot]:
                marks[slot] = int(slot in in_use)
                hand[b, h] = (slot + 1) % num_slots
            hand[b, h] = (slot + 1) % num_slots
            in_use.add(slot)
            held[slot], marks[slot], slots[b, 0, h, i] = t, 1, slot
            missing[b, 0, h, m], num_missing[b, h] = i, m + 1
            page, row = pages[t], rows[t]
            slot_of_row[page, h, row] = slot
            k_rows[b, slot, h], v_rows[b, slot, h] = k_cache[page, row, h], v_cache[page, row, h]
    return slots, missing, num_missing


def gather_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    indices: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the named rows in float64; float64 too for a float64 q."""
    batch, q_len, num_heads, head_dim = q.shape
    group = num_heads // k_cache.shape[2]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros_like(q, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64, device=q.device)
    for b in range(batch):
        page, row = locate(block_table[b], k_cache.shape[1], int(cache_seqlens[b]))
        for j in range(q_len):
            visible = int(cache_seqlens[b]) - q_len + j + 1
            for i in range(num_heads):
                t = indices[b, j, i // group].long()
                t = t[(t >= 0) & (t < visible)]
                k, v = (  # [selected, head_dim]
                    (cache[page[t], row[t]].double() * per_head(factor))[:, i // group]
                    for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
                )
                logits = scale * (k @ q[b, j, i].double())
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                out[b, j, i] = logits.softmax(0) @ v
                lse[b, j, i] = logits.logsumexp(0)
    return out.to(q.dtype), lse if q.dtype == torch.float64 else lse.float()


def dense_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    min_sparse_len: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """gather_attention over all positions; 0 and -infinity for long sequences, which it leaves."""
    batch, q_len, num_kv_heads = *q.shape[:2], k_cache.shape[2]
    capacity = block_table.shape[1] * k_cache.shape[1]
    positions = torch.arange(capacity, dtype=torch.int32, device=q.device)
    indices = positions.expand(batch, q_len, num_kv_heads, -1)
    if min_sparse_len is not None:
        is_long = cache_seqlens[:, None, None, None] >= min_sparse_len
        indices = indices.masked_fill(is_long, -1)
    tensors = (q, k_cache, v_cache, block_table, cache_seqlens)
    return gather_attention(
        *tensors,
        indices,
        softmax_scale=softmax_scale,
        softcap=softcap,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys, each weighted by its share of the softmax's sum."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    out = torch.zeros_like(out_a, dtype=torch.float64)
    for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
        share = torch.exp(lse_x.double() - lse)[..., None]
        out += torch.where(lse_x[..., None] == -torch.inf, 0.0, share * out_x.double())
    return out.to(out_a.dtype), lse.to(lse_a.dtype)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weights: Tensor,
    query_weights: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    code_cache: Tensor,
    norm_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    query_bits: int,
    top_k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    top_k_share: float | None = None,
    min_top_k: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Appends, encodes, scores, selects and attends, one after the other."""
    codes = (code_cache, norm_cache, block_table, cache_seqlens)
    new = (k, v, key_weights, k_cache, v_cache)
    cache_append(*new, *codes, k_scale=k_scale, v_scale=v_scale)
    group = q.shape[2] // k.shape[2]
    indices, num_selected = score_select(
        encode_query(q, query_weights, query_bits=query_bits),
        *codes,
        weight_sum=group if query_bits == 1 else 2**query_bits - 1,
        top_k=top_k,
        num_sink=num_sink,
        num_recent=num_recent,
        top_k_share=top_k_share,
        min_top_k=min_top_k,
    )
    out, lse = gather_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        cache_seqlens,
        indices,
        softmax_scale=softmax_scale,
        softcap=softcap,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return out, lse, indices, num_selected


def locate(pages: Tensor, page_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """The page and the row in it of each of a sequence's positions."""
    t = torch.arange(seq_len, device=pages.device)
    return pages[t // page_size].long(), t % page_size
