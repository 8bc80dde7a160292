"""A cache as plain lists: what `hata.HataCache` must hold after any sequence of calls."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import hata
from closeness import assert_equal
from hata import HashWeights, HataCache, HataConfig
from hata.offload import OffloadedCache

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 2, 2, 64
WEIGHTS = HashWeights.random(
    num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, num_bits=64
)
WITH_NORMS = replace(WEIGHTS, key_norms=True)


def make_cache(
    device: str,
    dtype: torch.dtype,
    *,
    batch: int = 3,
    max_seq_len: int = 50,
    page_size: int | None = None,
    num_pages: int | None = None,
    config: HataConfig | None = None,
    weights: HashWeights | None = None,
    kv_cache_dtype: torch.dtype | None = None,
    record_cuts: bool = False,
    **offload: int,
) -> HataCache:
    """With a config a cache without norms for attention, else one with norms to look into.

    What an `OffloadedCache` takes besides makes it one.
    """
    return (OffloadedCache if offload else HataCache)(
        weights or (WITH_NORMS if config is None else WEIGHTS),
        config,
        batch=batch,
        max_seq_len=max_seq_len,
        page_size=page_size,
        num_pages=num_pages,
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        record_cuts=record_cuts,
        **offload,
    )


def new_tokens(cache: HataCache, q_len: int) -> tuple[Tensor, Tensor]:
    shape = (cache.batch, q_len, NUM_KV_HEADS, HEAD_DIM)
    k, v = torch.randn(shape), torch.randn(shape)
    return k.to(cache.device, cache.dtype), v.to(cache.device, cache.dtype)


def layer_weights(cache: HataCache, layer_idx: int) -> Tensor:
    return WEIGHTS.layer(layer_idx, cache.dtype, cache.device)[0]


def contents(cache: HataCache) -> list[Tensor]:
    """A copy of everything that the cache holds."""
    norms = [norms for norms in cache.norm_cache if norms is not None]
    tensors = [*cache.k_cache, *cache.v_cache, *cache.code_cache, *norms]
    return [t.clone() for t in (*tensors, cache.block_table, cache.cache_seqlens)]


def assert_unchanged(cache: HataCache, before: list[Tensor], seq_lens: Sequence[int]) -> None:
    assert cache.seq_lens == list(seq_lens)
    for now, then in zip(contents(cache), before, strict=True):
        assert_equal(now, then)


class CacheModel:
    """Applies each call to a cache and to lists of tokens, which `check` compares."""

    def __init__(self, cache: HataCache) -> None:
        self.cache = cache
        empty = torch.empty(0, NUM_KV_HEADS, HEAD_DIM, dtype=cache.dtype, device=cache.device)
        self.tokens = [[(empty, empty)] * cache.batch for _ in range(NUM_LAYERS)]

    def append(self, q_len: int, new: list[int] | None = None) -> None:
        for layer_idx in range(NUM_LAYERS):
            k, v = new_tokens(self.cache, q_len)
            self.cache.append(layer_idx, k, v, new_seqlens=new)
            for b, (old_k, old_v) in enumerate(self.tokens[layer_idx]):
                start = 0 if new is None else q_len - new[b]
                grown = torch.cat([old_k, k[b, start:]]), torch.cat([old_v, v[b, start:]])
                self.tokens[layer_idx][b] = grown

    def truncate(self, lengths: list[int]) -> None:
        self.cache.truncate(lengths)
        for layer in self.tokens:
            layer[:] = [(k[:n], v[:n]) for (k, v), n in zip(layer, lengths, strict=True)]

    def reorder(self, order: list[int]) -> None:
        self.cache.reorder(order)
        for layer in self.tokens:
            layer[:] = [layer[old] for old in order]

    def reset(self) -> None:
        self.cache.reset()
        for layer in self.tokens:
            layer[:] = [(k[:0], v[:0]) for k, v in layer]

    @property
    def lengths(self) -> list[int]:
        return [len(k) for k, _ in self.tokens[0]]

    def check(self) -> None:
        cache = self.cache
        assert cache.seq_lens == cache.cache_seqlens.tolist() == self.lengths
        used = [-(-n // cache.page_size) if cache.paged else 1 for n in self.lengths]
        held = [row[:n].tolist() for row, n in zip(cache.block_table, used, strict=True)]
        pages = [page for row in held for page in row]
        assert len(set(pages)) == len(pages) == int((cache.block_table >= 0).sum())
        for layer_idx, layer in enumerate(self.tokens):
            weights = layer_weights(cache, layer_idx)
            for b, (k, v) in enumerate(layer):
                cached_k, cached_v = cache.keys_values(layer_idx, b)
                assert_equal(cached_k[0], k)
                assert_equal(cached_v[0], v)
                codes, norms = hata.hash_encode(k[None], weights, key_norms=True)
                norm_cache = cache.norm_cache[layer_idx]
                assert norm_cache is not None
                for kept, fresh in ((cache.code_cache[layer_idx], codes), (norm_cache, norms)):
                    rows = torch.cat([kept[page] for page in held[b]] or [kept[0]], dim=1)
                    assert_equal(rows[:, : len(k)], fresh[0])
