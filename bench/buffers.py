"""Input sets of one decoding step, enough of them that using one after another keeps caches cold.

K and V do not depend on how keys are hashed, so the cases of one shape share a ``KvPool``; a
``CodePool`` adds what one case needs. Codes, queries and the selection they lead to are random or
captured (``inputs.py``); values are random. Each kind of tensor comes in as many sets as its own
size asks for, and call i uses set i of each, modulo their number.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

import hata

from .cases import NUM_RECENT, NUM_SINK, Case, Shape
from .inputs import Captured, repeat_to
from .timing import Call, Timer


def repeated_random(num_sets: int, size: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns ``[num_sets, *size]`` with the same normal random numbers in every set."""
    pool = like.new_empty(num_sets, *size)
    if like.dtype.itemsize == 1:  # torch draws no float8
        pool[0] = torch.randn(size, dtype=torch.bfloat16, device=like.device)
    else:
        pool[0].normal_()
    pool[1:] = pool[0]
    return pool


def cyclic(pool: Tensor, i: int) -> Tensor:
    """Returns the set of ``pool`` ``[num_sets, ...]`` that call i uses."""
    return pool[i % len(pool)]


class KvPool:
    """K and V caches, queries and new tokens of one shape.

    Args:
        shape: The layer.
        timer: Says how many sets the cache's size asks for.
        memory_limit: Bytes that the K and V caches may take together.
        captured: Where keys and queries come from; None draws them.
    """

    def __init__(
        self, shape: Shape, timer: Timer, memory_limit: int, captured: Captured | None = None
    ) -> None:
        self.shape = shape
        self.captured = captured
        affordable = memory_limit // shape.kv_bytes
        if affordable == 0:
            raise MemoryError(
                f"one set of K and V caches takes {shape.kv_bytes / 1e9:.3g} GB, "
                f"--memory-limit-gb is {memory_limit / 1e9:g}"
            )
        num_sets = timer.num_sets(shape.row_bytes)
        self.num_sets = min(num_sets, affordable)
        like = torch.empty(0, dtype=shape.dtype, device=timer.device)
        token = (shape.batch, shape.q_len, shape.num_kv_heads, shape.head_dim)
        cache = (shape.batch, shape.seq_len, shape.num_kv_heads, shape.head_dim)
        rows = like.to(shape.kv_cache_dtype or shape.dtype)
        self.k_caches = repeated_random(self.num_sets, cache, rows)
        self.v_caches = repeated_random(self.num_sets, cache, rows)
        self.ks = like.new_empty(num_sets, *token).normal_()
        self.vs = like.new_empty(num_sets, *token).normal_()
        if captured is None:
            heads = (shape.batch, shape.q_len, shape.num_heads, shape.head_dim)
            self.qs = like.new_empty(num_sets, *heads).normal_()
        else:
            self.qs = captured.q(shape, num_sets, timer.device)
            keys = repeat_to(captured.tile(shape, timer.device), 0, shape.seq_len)
            self.k_caches[:] = keys
            self.ks[:] = keys[-shape.q_len :]
        self.cache_seqlens = torch.full(
            (shape.batch,), shape.seq_len, dtype=torch.int32, device=timer.device
        )


class CodePool:
    """Codes, hash weights, selections and outputs of one case on a ``KvPool``.

    The workspace and the outputs are one buffer each, as they are for the layers of a model.
    """

    def __init__(self, kv: KvPool, case: Case, timer: Timer) -> None:
        shape, config, device = case.shape, case.config, timer.device
        self.kv = kv
        self.case = case
        self.config = config
        self.timer = timer
        self.page_size = case.page_size or shape.seq_len
        self.weight_sum = config.weight_sum(shape)
        self.num_sets = max(timer.num_sets(size) for size in (case.code_bytes, case.row_bytes))
        num_pages = shape.batch * shape.seq_len // self.page_size
        pages = torch.randperm(num_pages) if case.page_size else torch.arange(num_pages)
        self.live_pages = pages.view(shape.batch, -1).to(device)
        missing = (shape.max_seq_len - shape.seq_len) // self.page_size  # not given out yet
        self.block_table = pad(self.live_pages.int(), (0, missing))

        num_weights = timer.num_sets(2 * config.weight_bytes(shape))
        self.key_weights, self.query_weights = self._weights(num_weights)
        self.codes, self.norms = self._codes()

        sets = range(self.num_sets)
        self.planes = torch.stack([self.encode_query(i) for i in sets])
        selections = zip(*(self.score_select(i) for i in sets), strict=True)
        self.indices, self.num_selected = map(torch.stack, selections)
        self.out = torch.empty_like(kv.qs[0])
        self.lse = torch.empty(kv.qs.shape[1:-1], dtype=torch.float32, device=device)
        size = hata.workspace_size(
            batch=shape.batch,
            q_len=shape.q_len,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_seq_len=shape.max_seq_len,
            top_k=shape.top_k,
        )
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)

    def _weights(self, num_sets: int) -> tuple[Tensor, Tensor]:
        """The paper's codes use one matrix for keys and queries; captured files say."""
        shape, config, captured = self.kv.shape, self.config, self.kv.captured
        size = (num_sets, shape.num_kv_heads, shape.head_dim, config.num_bits)
        if captured is not None:
            key, query = captured.weights(shape, config.num_bits, self.kv.qs.device)
            return key.repeat(num_sets, 1, 1, 1), query.repeat(num_sets, 1, 1, 1)
        key = self.kv.qs.new_empty(size).normal_()
        return key, key if config.query_bits == 1 else torch.randn_like(key)

    def _codes(self) -> tuple[Tensor, Tensor | None]:
        """Returns code and norm caches, one per input set; norms as of normal random keys."""
        shape, config, captured = self.kv.shape, self.config, self.kv.captured
        size = (self.num_sets, self.live_pages.numel(), shape.num_kv_heads, self.page_size)
        device = self.block_table.device
        codes = torch.empty(*size, config.num_words, dtype=torch.int32, device=device)
        norms = torch.empty(size, dtype=torch.float16, device=device) if config.key_norms else None
        if captured is None:
            codes.random_(-(2**31), 2**31)
            if norms is not None:
                norms.normal_(shape.head_dim**0.5, 0.7)
            return codes, norms
        tile = captured.tile(shape, device)[None]
        encoded = torch.ops.hata.hash_encode(tile, self.key_weights[0], config.key_norms)
        for cache, tiles in zip((codes, norms), encoded, strict=True):
            if cache is not None:
                head_major = repeat_to(tiles[0], 1, shape.seq_len)
                pages = head_major.unflatten(1, (-1, self.page_size)).transpose(0, 1)
                cache[:, self.live_pages] = pages
        return codes, norms

    def k_cache(self, i: int) -> Tensor:
        return self._paged(cyclic(self.kv.k_caches, i))

    def v_cache(self, i: int) -> Tensor:
        return self._paged(cyclic(self.kv.v_caches, i))

    def _paged(self, cache: Tensor) -> Tensor:
        return cache.view(-1, self.page_size, *cache.shape[2:])

    def norm_cache(self, i: int) -> Tensor | None:
        return None if self.norms is None else cyclic(self.norms, i)

    def encode_query(self, i: int) -> Tensor:
        q, query_weights = cyclic(self.kv.qs, i), cyclic(self.query_weights, i)
        return hata.encode_query(q, query_weights, query_bits=self.config.query_bits)

    def cache_append(self, i: int) -> None:
        hata.cache_append(
            cyclic(self.kv.ks, i),
            cyclic(self.kv.vs, i),
            cyclic(self.key_weights, i),
            self.k_cache(i),
            self.v_cache(i),
            cyclic(self.codes, i),
            self.norm_cache(i),
            self.block_table,
            self.kv.cache_seqlens,
        )

    def append_without_codes(self, i: int) -> None:
        hata.cache_append(
            cyclic(self.kv.ks, i),
            cyclic(self.kv.vs, i),
            None,
            self.k_cache(i),
            self.v_cache(i),
            None,
            None,
            self.block_table,
            self.kv.cache_seqlens,
        )

    def encode_append(self, i: int) -> None:
        self.encode_query(i)
        self.cache_append(i)

    def score_select(self, i: int) -> tuple[Tensor, Tensor]:
        return hata.score_select(
            cyclic(self.planes, i),
            cyclic(self.codes, i),
            self.norm_cache(i),
            self.block_table,
            self.kv.cache_seqlens,
            weight_sum=self.weight_sum,
            top_k=self.kv.shape.top_k,
            num_sink=NUM_SINK,
            num_recent=NUM_RECENT,
        )

    def gather_attention(self, i: int) -> tuple[Tensor, Tensor]:
        return hata.gather_attention(
            cyclic(self.kv.qs, i),
            self.k_cache(i),
            self.v_cache(i),
            self.block_table,
            self.kv.cache_seqlens,
            cyclic(self.indices, i),
        )

    def shared_step(self, i: int) -> tuple[Tensor, Tensor]:
        """The step of a layer that attends to the selection of an earlier one."""
        self.append_without_codes(i)
        return self.gather_attention(i)

    def dense_attention(self, i: int) -> tuple[Tensor, Tensor]:
        return hata.dense_attention(
            cyclic(self.kv.qs, i),
            self.k_cache(i),
            self.v_cache(i),
            self.block_table,
            self.kv.cache_seqlens,
            out=self.out,
            lse=self.lse,
        )

    def decode_step(self, i: int) -> None:
        self.prepared_step(i)()

    def prepared_step(self, i: int) -> Call:
        """Returns a step whose arguments are there: what is left is hata's own."""
        return functools.partial(
            hata.decode_step,
            cyclic(self.kv.qs, i),
            cyclic(self.kv.ks, i),
            cyclic(self.kv.vs, i),
            cyclic(self.key_weights, i),
            cyclic(self.query_weights, i),
            self.k_cache(i),
            self.v_cache(i),
            cyclic(self.codes, i),
            self.norm_cache(i),
            self.block_table,
            self.kv.cache_seqlens,
            query_bits=self.config.query_bits,
            top_k=self.kv.shape.top_k,
            num_sink=NUM_SINK,
            num_recent=NUM_RECENT,
            workspace=self.workspace,
            indices=cyclic(self.indices, i),
            num_selected=cyclic(self.num_selected, i),
            out=self.out,
            lse=self.lse,
        )

    def calls(self, part: str) -> list[Call]:
        """Returns calls of the method ``part``, one per input set, enough to keep caches cold."""
        encodes = 2 * self.config.weight_bytes(self.kv.shape)
        touched = {
            "encode_query": encodes // 2,
            "cache_append": encodes // 2,
            "encode_append": encodes,
            "score_select": self.case.code_bytes,
            "gather_attention": self.case.row_bytes,
            "shared_step": self.case.row_bytes,
            "dense_attention": self.kv.shape.kv_bytes,
            "decode_step": encodes + self.case.num_bytes,
        }
        count = self.timer.num_sets(touched[part])
        return [functools.partial(getattr(self, part), i) for i in range(count)]

    def slots(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the pages ``[batch, ...]`` and rows of ``positions`` of every sequence."""
        return self.live_pages[:, positions // self.page_size], positions % self.page_size
