"""What the tests of attention over a `hata.HataCache` share."""

from typing import Any

import torch
from torch import Tensor

import hata
from cache_model import HEAD_DIM, NUM_KV_HEADS, make_cache, new_tokens
from closeness import assert_no_worse_than_pytorch
from hata import HataCache, HataConfig

DENSE, SPARSE = 0, 1  # the layers of every cache here
# Sparse at any length, as the default is not on CUDA.
EVERYTHING = HataConfig(top_k=64, num_dense_layers=1, min_sparse_len=0)
FEW = HataConfig(top_k=9, num_sink=2, num_recent=3, num_dense_layers=1, min_sparse_len=0)


def queries(cache: HataCache, q_len: int, group: int = 3) -> Tensor:
    shape = (cache.batch, q_len, NUM_KV_HEADS * group, HEAD_DIM)
    return torch.randn(shape).to(cache.device, cache.dtype)


def all_positions(cache: HataCache, q_len: int) -> Tensor:
    shape = (cache.batch, q_len, NUM_KV_HEADS, max(cache.seq_lens))
    positions = torch.arange(shape[-1], dtype=torch.int32, device=cache.device)
    return positions.expand(shape).contiguous()


def attention(
    q: Tensor,
    cache: HataCache,
    layer_idx: int,
    indices: Tensor | None,
    softmax_scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention over what the cache holds, or the rows that indices name, in the dtype of q."""
    out = torch.zeros_like(q)
    q_len, group = q.shape[1], q.shape[2] // NUM_KV_HEADS
    for b, seq_len in enumerate(cache.seq_lens):
        k, v = (t[0].to(q.dtype).transpose(0, 1) for t in cache.keys_values(layer_idx, b))
        last = torch.arange(seq_len - q_len, seq_len, device=q.device)
        mask = (torch.arange(seq_len, device=q.device) <= last[:, None]).expand(
            NUM_KV_HEADS, -1, -1
        )
        if indices is not None:
            chosen = torch.zeros(NUM_KV_HEADS, q_len, seq_len + 1, device=q.device)
            rows = indices[b].transpose(0, 1).long()
            chosen.scatter_(2, torch.where(rows < 0, seq_len, rows), 1.0)
            mask = mask & (chosen[..., :seq_len] > 0)
        for i in range(q.shape[2]):
            h = i // group
            logits = (q[b, :, i] @ k[h].T).to(torch.promote_types(q.dtype, torch.float32))
            logits = logits * softmax_scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~mask[h], -torch.inf)
            if sink_logits is not None:
                sink = sink_logits[i].to(logits.dtype).expand(q_len, 1)
                logits = torch.cat([logits, sink], dim=-1)
            shares = logits.softmax(-1)[:, :seq_len]
            out[b, :, i] = shares.to(q.dtype) @ v[h]
    return out


def assert_attends(
    out: Tensor,
    q: Tensor,
    cache: HataCache,
    layer_idx: int,
    indices: Tensor | None = None,
    softmax_scale: float = HEAD_DIM**-0.5,
    **logits: Any,
) -> None:
    """``out`` is the attention over what the cache holds now; without indices, over all of it."""
    plain = attention(q, cache, layer_idx, indices, softmax_scale, **logits)
    truth = attention(q.double(), cache, layer_idx, indices, softmax_scale, **logits)
    assert_no_worse_than_pytorch(out, plain, truth)


def fill(cache: HataCache, q_len: int, new_seqlens: list[int] | None = None) -> None:
    """Gives every layer the same random prompt."""
    q, (k, v) = queries(cache, q_len), new_tokens(cache, q_len)
    for layer_idx in (DENSE, SPARSE):
        hata.prefill(q, k, v, cache, layer_idx, new_seqlens=new_seqlens)


def single(cache: HataCache, batch_idx: int) -> HataCache:
    """A cache that holds one sequence of another."""
    alone = make_cache(str(cache.device), cache.dtype, batch=1, config=cache.config)
    alone.extend(cache.seq_lens[batch_idx])
    for layer_idx in (DENSE, SPARSE):
        k, v = cache.keys_values(layer_idx, batch_idx)
        alone.append(layer_idx, k, v)
    return alone
