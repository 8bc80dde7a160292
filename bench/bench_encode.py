"""hash_encode, encode_query and cache_append: projections that are packed to bits."""

import functools
from collections.abc import Callable

import torch

import hata
from hata import reference

from .buffers import CodePool
from .cases import CodeConfig
from .checks import check_encode, require, require_same_bits
from .report import Row
from .run import Run
from .timing import Call

CHECKED_TOKENS = 256  # of a prompt, at its beginning and at its end


def encode_query(run: Run, pool: CodePool) -> Row:
    check_encode(pool)
    shape, config = pool.kv.shape, pool.config
    num_bytes = pool.kv.qs[0].nbytes + config.weight_bytes(shape) + pool.planes[0].nbytes
    timing = run.timer(pool.calls("encode_query"))
    return run.op_row("encode_query", shape, config, pool.page_size, timing, num_bytes)


def cache_append(run: Run, pool: CodePool) -> Row:
    check_encode(pool)
    shape, config = pool.kv.shape, pool.config
    num_bytes = (
        2 * (pool.kv.ks[0].nbytes + pool.kv.vs[0].nbytes)  # read, and written
        + config.weight_bytes(shape)
        + config.code_bytes(shape) // shape.seq_len
    )
    timing = run.timer(pool.calls("cache_append"))
    return run.op_row("cache_append", shape, config, pool.page_size, timing, num_bytes)


class Prompt:
    """A whole prompt's keys and values, and an empty cache for them, in enough cold sets."""

    def __init__(self, run: Run, config: CodeConfig) -> None:
        shape = run.plan.prompt
        like = torch.empty(0, dtype=shape.dtype, device=run.timer.device)
        tokens = (shape.batch, shape.seq_len, shape.num_kv_heads, shape.head_dim)
        self.shape, self.config = shape, config
        self.num_sets = run.timer.num_sets(shape.kv_bytes // 2)
        self.keys = like.new_empty(self.num_sets, *tokens).normal_()
        self.values = like.new_empty(self.num_sets, *tokens).normal_()
        self.k_caches = torch.zeros_like(self.keys)
        self.v_caches = torch.zeros_like(self.values)
        self.weights = like.new_empty(shape.num_kv_heads, shape.head_dim, config.num_bits).normal_()
        heads = (self.num_sets, shape.batch, shape.num_kv_heads, shape.seq_len)
        self.codes = torch.zeros(*heads, config.num_words, dtype=torch.int32, device=like.device)
        self.norms = (
            torch.zeros(heads, dtype=torch.float16, device=like.device)
            if config.key_norms
            else None
        )
        self.block_table = torch.arange(shape.batch, dtype=torch.int32, device=like.device)[:, None]
        self.cache_seqlens = torch.full_like(self.block_table[:, 0], shape.seq_len)

    def hash_encode(self, i: int) -> torch.Tensor:
        """Returns the codes."""
        return torch.ops.hata.hash_encode(self.keys[i], self.weights, self.config.key_norms)[0]

    def cache_append(self, i: int) -> None:
        hata.cache_append(
            self.keys[i],
            self.values[i],
            self.weights,
            self.k_caches[i],
            self.v_caches[i],
            self.codes[i],
            None if self.norms is None else self.norms[i],
            self.block_table,
            self.cache_seqlens,
        )

    def project(self, i: int) -> torch.Tensor:
        return torch.matmul(self.keys[i].transpose(1, 2), self.weights)

    def calls(self, part: Callable[[int], object]) -> list[Call]:
        return [functools.partial(part, i) for i in range(self.num_sets)]

    def check_codes(self, codes: torch.Tensor, op: str) -> None:
        """Requires that ``codes`` are the reference's of set 0."""
        for tokens in (slice(CHECKED_TOKENS), slice(-CHECKED_TOKENS, None)):
            expected = reference.hash_encode(self.keys[0][:, tokens], self.weights)
            require_same_bits(codes[:, :, tokens], expected, f"{op} equals the reference")


def hash_encode_prompt(run: Run, prompt: Prompt) -> Row:
    """Against the projection alone: PyTorch has nothing that packs bits."""
    prompt.check_codes(prompt.hash_encode(0), "hash_encode")
    shape, config = prompt.shape, prompt.config
    num_bytes = prompt.keys[0].nbytes + config.code_bytes(shape) + prompt.weights.nbytes
    timing = run.timer(prompt.calls(prompt.hash_encode))
    return run.op_row(
        "hash_encode",
        shape,
        config,
        None,
        timing,
        num_bytes,
        q_len=shape.seq_len,
        rivals={"torch.matmul, not packed": run.timer(prompt.calls(prompt.project)).us},
    )


def cache_append_prompt(run: Run, prompt: Prompt, prefill_us: float | None) -> Row:
    """Against copying the keys and values, and beside the same prompt's dense attention.

    Copying is the least that any append does; the attention is what prefill costs anyway.
    """
    prompt.cache_append(0)
    prompt.check_codes(prompt.codes[0], "cache_append")
    require(torch.equal(prompt.k_caches[0], prompt.keys[0]), "cache_append wrote k")
    require(torch.equal(prompt.v_caches[0], prompt.values[0]), "cache_append wrote v")
    shape, config = prompt.shape, prompt.config
    num_bytes = 2 * shape.kv_bytes + config.code_bytes(shape) + prompt.weights.nbytes
    timing = run.timer(prompt.calls(prompt.cache_append))

    def copy(i: int) -> None:
        prompt.k_caches[i].copy_(prompt.keys[i])
        prompt.v_caches[i].copy_(prompt.values[i])

    row = run.op_row(
        "cache_append",
        shape,
        config,
        shape.seq_len,
        timing,
        num_bytes,
        q_len=shape.seq_len,
        rivals={"copy of k and v": run.timer(prompt.calls(copy)).us},
    )
    if prefill_us is not None:
        row |= {"prefill_us": prefill_us, "percent_of_prefill": 100 * timing.us / prefill_us}
    return row
