"""Input sets of one decoding step, enough of them that using one after another keeps caches cold.

K and V do not depend on how keys are hashed, so the configurations of one shape share a ``KvPool``;
a ``CodePool`` adds what one configuration needs. Codes, queries and the selection they lead to are
random, as are K and V. Each kind of tensor comes in as many sets as its own size asks for, and call
i uses set i of each, modulo their number.
"""

import functools

import torch
from torch import Tensor

import hata

from .cases import CONTIGUOUS, NUM_RECENT, NUM_SINK, CodeConfig, Shape
from .timing import Call, Timer


def repeated_random(num_sets: int, size: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns ``[num_sets, *size]`` with the same normal random numbers in every set."""
    pool = like.new_empty(num_sets, *size)
    pool[0].normal_()
    pool[1:] = pool[0]
    return pool


def cyclic(pool: Tensor, i: int) -> Tensor:
    """Returns the set of ``pool`` ``[num_sets, ...]`` that call i uses."""
    return pool[i % len(pool)]


class KvPool:
    """K and V caches, queries and new tokens of one shape; every sequence is full.

    Args:
        shape: The layer.
        dtype: Of keys, values and queries.
        timer: Says how many sets the cache's size asks for.
        memory_limit: Bytes that the K and V caches may take together.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        timer: Timer,
        memory_limit: int,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        affordable = memory_limit // shape.kv_bytes(dtype)
        if affordable == 0:
            raise MemoryError(
                f"one set of K and V caches takes {shape.kv_bytes(dtype) / 1e9:.3g} GB, "
                f"--memory-limit-gb is {memory_limit / 1e9:g}"
            )
        self.num_sets = min(timer.num_sets(shape.row_bytes(dtype)), affordable)
        like = torch.empty(0, dtype=dtype, device=timer.device)
        token = (shape.batch, 1, shape.num_kv_heads, shape.head_dim)
        cache = (shape.batch, shape.seq_len, shape.num_kv_heads, shape.head_dim)
        self.k_caches = repeated_random(self.num_sets, cache, like)
        self.v_caches = repeated_random(self.num_sets, cache, like)
        self.ks = like.new_empty(self.num_sets, *token).normal_()
        self.vs = like.new_empty(self.num_sets, *token).normal_()
        heads = (shape.batch, 1, shape.num_heads, shape.head_dim)
        self.qs = like.new_empty(self.num_sets, *heads).normal_()
        self.cache_seqlens = torch.full(
            (shape.batch,), shape.seq_len, dtype=torch.int32, device=timer.device
        )


class CodePool:
    """Codes, hash weights, selections and outputs of one configuration on a ``KvPool``.

    The workspace and the outputs are one buffer each, as they are for the layers of a model.
    """

    def __init__(
        self, kv: KvPool, config: CodeConfig, timer: Timer, page_size: int = CONTIGUOUS
    ) -> None:
        shape, device = kv.shape, timer.device
        self.kv = kv
        self.config = config
        self.page_size = page_size or shape.seq_len
        self.softmax_scale = shape.head_dim**-0.5
        self.weight_sum = config.weight_sum(shape)
        self.num_sets = max(kv.num_sets, timer.num_sets(config.code_bytes(shape)))
        num_pages = shape.batch * shape.seq_len // self.page_size
        pages = torch.randperm(num_pages) if page_size else torch.arange(num_pages)
        self.block_table = pages.view(shape.batch, -1).to(device, torch.int32)

        int32 = functools.partial(torch.empty, dtype=torch.int32, device=device)
        self.codes = torch.randint(
            -(2**31),
            2**31,
            (self.num_sets, num_pages, shape.num_kv_heads, self.page_size, config.num_words),
            dtype=torch.int32,
            device=device,
        )
        self.norms = None
        if config.key_norms:  # of normal random keys
            self.norms = torch.empty(self.codes.shape[:-1], dtype=torch.float16, device=device)
            self.norms.normal_(shape.head_dim**0.5, 0.7)

        num_weights = timer.num_sets(config.weight_bytes(shape, kv.dtype))
        weights = (num_weights, shape.num_kv_heads, shape.head_dim, config.num_bits)
        self.key_weights = kv.qs.new_empty(weights).normal_()
        # The paper's codes use one matrix for keys and queries.
        self.query_weights = (
            self.key_weights if config.query_bits == 1 else kv.qs.new_empty(weights).normal_()
        )

        per_head = (self.num_sets, shape.batch, 1, shape.num_kv_heads)
        self.planes = int32(*per_head, config.num_planes(shape), config.num_words)
        self.indices = int32(*per_head, shape.top_k)
        self.num_selected = int32(*per_head)
        self.out = torch.empty_like(kv.qs[0])
        self.lse = torch.empty(kv.qs.shape[1:-1], dtype=torch.float32, device=device)
        size = hata.workspace_size(
            batch=shape.batch,
            q_len=1,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_seq_len=shape.seq_len,
            top_k=shape.top_k,
        )
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)
        for i in range(self.num_sets):
            self.encode_query(i)
            self.score_select(i)

    def k_cache(self, i: int) -> Tensor:
        return self._paged(cyclic(self.kv.k_caches, i))

    def v_cache(self, i: int) -> Tensor:
        return self._paged(cyclic(self.kv.v_caches, i))

    def _paged(self, cache: Tensor) -> Tensor:
        return cache.view(-1, self.page_size, *cache.shape[2:])

    def norm_cache(self, i: int) -> Tensor | None:
        return None if self.norms is None else cyclic(self.norms, i)

    def encode_query(self, i: int) -> None:
        torch.ops.hata.encode_query.out(
            cyclic(self.kv.qs, i),
            cyclic(self.query_weights, i),
            self.config.query_bits,
            planes=cyclic(self.planes, i),
        )

    def cache_append(self, i: int) -> None:
        torch.ops.hata.cache_append(
            cyclic(self.kv.ks, i),
            cyclic(self.kv.vs, i),
            cyclic(self.key_weights, i),
            self.k_cache(i),
            self.v_cache(i),
            cyclic(self.codes, i),
            self.norm_cache(i),
            self.block_table,
            self.kv.cache_seqlens,
            None,
        )

    def encode_append(self, i: int) -> None:
        self.encode_query(i)
        self.cache_append(i)

    def score_select(self, i: int) -> None:
        torch.ops.hata.score_select.out(
            self.planes[i],
            self.codes[i],
            self.norm_cache(i),
            self.block_table,
            self.kv.cache_seqlens,
            self.weight_sum,
            self.kv.shape.top_k,
            NUM_SINK,
            NUM_RECENT,
            workspace=self.workspace,
            indices=self.indices[i],
            num_selected=self.num_selected[i],
        )

    def gather_attention(self, i: int) -> None:
        torch.ops.hata.gather_attention.out(
            cyclic(self.kv.qs, i),
            self.k_cache(i),
            self.v_cache(i),
            self.block_table,
            self.kv.cache_seqlens,
            self.indices[i],
            self.softmax_scale,
            workspace=self.workspace,
            out=self.out,
            lse=self.lse,
        )

    def decode_step(self, i: int) -> None:
        torch.ops.hata.decode_step(
            cyclic(self.kv.qs, i),
            cyclic(self.kv.ks, i),
            cyclic(self.kv.vs, i),
            cyclic(self.key_weights, i),
            cyclic(self.query_weights, i),
            self.k_cache(i),
            self.v_cache(i),
            self.codes[i],
            self.norm_cache(i),
            self.block_table,
            self.kv.cache_seqlens,
            self.config.query_bits,
            self.kv.shape.top_k,
            NUM_SINK,
            NUM_RECENT,
            self.softmax_scale,
            workspace=self.workspace,
            indices=self.indices[i],
            num_selected=self.num_selected[i],
            out=self.out,
            lse=self.lse,
        )

    def calls(self, part: str) -> list[Call]:
        """Returns one call of the method ``part`` per set; encoding needs more sets of weights."""
        encodes = part in ("encode_query", "cache_append", "encode_append")
        count = max(self.num_sets, len(self.key_weights)) if encodes else self.num_sets
        return [functools.partial(getattr(self, part), i) for i in range(count)]
