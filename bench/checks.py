"""Checks each output once before it is timed: against ``hata.reference``, or float32 attention.

Checked are the first KV head of the first sequence and the last of the last, so that a reference in
plain PyTorch fits in memory at every shape.
"""

import itertools

import torch
from torch import Tensor

from hata import reference

from .buffers import CodePool, KvPool
from .cases import NUM_RECENT, NUM_SINK

# The share of bits that may differ from the reference's: a projection within float32 rounding of a
# boundary may fall on either side. Random ones are, once in a million; a step of one level can then
# change every plane, and a small case has two thousand bits.
MAX_DIFFERING_BITS = 0.01


class CheckError(Exception):
    """An output that is about to be timed is wrong."""


def require(holds: bool, fact: str) -> None:
    if not holds:
        raise CheckError(f"wrong result: not {fact}")


def sampled_pairs(kv: KvPool) -> set[tuple[int, int]]:
    """Returns (sequence, KV head)."""
    return {(0, 0), (kv.shape.batch - 1, kv.shape.num_kv_heads - 1)}


def require_close(actual: Tensor, expected: Tensor, fact: str) -> None:
    """Requires an error below four roundings of the largest value in actual's dtype.

    A kernel rounds its weights and its output once each; float32 sums of many thousand terms in
    different orders differ by up to 2^-14 of it.
    """
    tolerance = max(4 * torch.finfo(actual.dtype).eps, 2**-14) * expected.abs().max().item()
    error = (actual.float() - expected).abs().max().item()
    require(error <= tolerance, f"{fact} (error {error:.2e}, allowed {tolerance:.2e})")


def float32_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q ``[group, head_dim]``, k and v ``[seq_len, head_dim]``."""
    scores = q.float() @ k.float().T * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ v.float()


def check_dense(kv: KvPool, out: Tensor, name: str, pool: CodePool | None = None) -> None:
    """Requires that out, reshaped to its heads, is one token's dense attention over input set 0.

    With a pool a sequence's rows are those of its pages, which lie anywhere among all sequences'.
    """
    group = kv.shape.group
    out = out.reshape(kv.shape.batch, kv.shape.num_heads, kv.shape.head_dim)
    for b, h in sampled_pairs(kv):
        heads = slice(h * group, (h + 1) * group)
        caches = [kv.k_caches[0, b], kv.v_caches[0, b]]
        if pool is not None:
            pages = pool.live_pages[b]
            caches = [cache[pages].flatten(0, 1) for cache in (pool.k_cache(0), pool.v_cache(0))]
        k, v = (cache[:, h] for cache in caches)
        expected = float32_attention(kv.qs[0, b, 0, heads], k, v)
        require_close(out[b, heads], expected, f"{name} is attention over the whole cache")


def bits(codes: Tensor) -> Tensor:
    """Unpacks int32 words to ``[..., num_words, 32]`` bits."""
    return codes.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=codes.device) & 1


def require_same_bits(actual: Tensor, expected: Tensor, fact: str) -> None:
    differing = (bits(actual) != bits(expected)).float().mean().item()
    require(differing <= MAX_DIFFERING_BITS, f"{fact} ({differing:.1%} of the bits differ)")


def check_new_rows(pool: CodePool) -> tuple[Tensor, Tensor]:
    """Requires that set 0's tokens are in the caches; returns their pages and rows."""
    kv, shape = pool.kv, pool.kv.shape
    new = torch.arange(shape.seq_len - shape.q_len, shape.seq_len, device=kv.qs.device)
    pages, rows = pool.slots(new)  # [batch, q_len], [q_len]
    for name, cache, tokens in (("k", pool.k_cache(0), kv.ks), ("v", pool.v_cache(0), kv.vs)):
        written = reference.as_rows(tokens[0], cache.dtype, None)
        require(torch.equal(cache[pages, rows], written), f"cache_append wrote {name}")
    return pages, rows


def check_encode(pool: CodePool) -> None:
    """Requires that encoding and appending set 0's token wrote what they should."""
    kv = pool.kv
    bits = {"query_bits": pool.config.query_bits}
    planes = reference.encode_query(kv.qs[0], pool.query_weights[0], **bits)
    require_same_bits(pool.encode_query(0), planes, "encode_query equals the reference")
    pool.cache_append(0)
    pages, rows = check_new_rows(pool)
    codes = reference.hash_encode(kv.ks[0], pool.key_weights[0]).transpose(1, 2)
    require_same_bits(
        pool.codes[0][pages, :, rows], codes, "cache_append wrote the reference's codes"
    )


def check_selection(pool: CodePool, selected: tuple[Tensor, Tensor]) -> None:
    """Requires that ``selected`` is the reference's selection for set 0's planes and codes."""
    kv = pool.kv
    for b, h in sampled_pairs(kv):
        norms = pool.norm_cache(0)
        indices, num_selected = reference.score_select(
            pool.planes[0][b : b + 1, :, h : h + 1],
            pool.codes[0][:, h : h + 1],
            None if norms is None else norms[:, h : h + 1],
            pool.block_table[b : b + 1],
            kv.cache_seqlens[b : b + 1],
            weight_sum=pool.weight_sum,
            top_k=kv.shape.top_k,
            num_sink=NUM_SINK,
            num_recent=NUM_RECENT,
        )
        same = torch.equal(selected[0][b, :, h], indices[0, :, 0])
        require(same, "score_select picks the reference's positions")
        count = torch.equal(selected[1][b, :, h], num_selected[0, :, 0])
        require(count, "score_select counts the selected positions")


def check_gathered(pool: CodePool, out: Tensor, name: str) -> None:
    """Requires that out, reshaped to its heads, is attention over set 0's selection."""
    kv, shape = pool.kv, pool.kv.shape
    out = out.reshape(shape.batch, shape.q_len, shape.num_heads, shape.head_dim)
    k_cache, v_cache = pool.k_cache(0), pool.v_cache(0)
    for (b, h), j in itertools.product(sampled_pairs(kv), range(shape.q_len)):
        positions = pool.indices[0, b, j, h].long()
        pages, rows = pool.slots(positions[positions >= 0])
        heads = slice(h * shape.group, (h + 1) * shape.group)
        expected = float32_attention(
            kv.qs[0, b, j, heads], k_cache[pages[b], rows, h], v_cache[pages[b], rows, h]
        )
        require_close(out[b, j, heads], expected, f"{name} is attention over the selected rows")


def check_shared_step(pool: CodePool) -> None:
    """Requires that a step over a given selection writes set 0's token and attends to it."""
    pages, rows = check_new_rows(pool)
    for cache in (pool.k_cache(0), pool.v_cache(0)):
        cache[pages, rows] = 0
    out, _ = pool.shared_step(0)
    check_new_rows(pool)
    check_gathered(pool, out, "shared_step")


def check_step(pool: CodePool) -> None:
    """Requires that every part of a step, and the step as one operator, is right on set 0."""
    check_encode(pool)
    check_selection(pool, pool.score_select(0))
    check_gathered(pool, pool.gather_attention(0)[0], "gather_attention")
    pool.indices[0].fill_(-1)
    pool.out.zero_()
    pool.decode_step(0)
    check_selection(pool, (pool.indices[0], pool.num_selected[0]))
    check_gathered(pool, pool.out, "decode_step")
