"""How close two results must be, and why."""

import torch
from torch import Tensor

from cases import Caches, storage_of


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for the payload of a NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_caches(actual: Caches, expected: Caches) -> None:
    """The whole of their storage is the same: what should stay untouched stayed so."""
    for name in ("k_cache", "v_cache", "code_cache", "norm_cache"):
        a, e = getattr(actual, name), getattr(expected, name)
        if e is not None:
            assert_equal(storage_of(a).to(e.device), storage_of(e))


def assert_no_worse_than_pytorch(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """FlashAttention's rule: at most twice the error of plain PyTorch in the same dtype.

    Both errors are against ``truth`` in float64. One rounding of the largest value comes on top,
    since plain PyTorch may be exact by luck where nothing but the result is rounded.
    """
    assert truth.dtype == torch.float64
    assert actual.dtype == plain.dtype
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert_equal(special(actual), special(truth))
    finite = truth.isfinite()
    if not finite.any():
        return
    truth = truth[finite]
    rounding = torch.finfo(actual.dtype).eps * truth.abs().max()
    allowed = 2 * (plain.double()[finite] - truth).abs().max() + rounding
    error = (actual.double()[finite] - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_within_rounding(
    attended: tuple[Tensor, Tensor],
    truth: tuple[Tensor, Tensor],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    top_k: int,
) -> None:
    """Out and lse are off by no more than their roundings, however few numbers there are.

    Sums of n float32 terms are off by about sqrt(n) times 2^-23 of their magnitudes: the logits',
    and the softmax's. The weights and the result are rounded to the dtype once each.
    """
    terms = q.shape[-1] + top_k
    norms = [t.double().nan_to_num().norm(dim=-1).max() for t in (q, k_cache)]
    logit = q.shape[-1] ** -0.5 * norms[0] * norms[1]
    in_float32 = terms**0.5 * 2.0**-23 * logit.clamp(min=1)
    for actual, exact in zip(attended, truth, strict=True):
        for special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert_equal(special(actual), special(exact))
    out, lse = ((a.double() - e).nan_to_num(0).abs() for a, e in zip(attended, truth, strict=True))
    largest_v = v_cache.double().nan_to_num().abs().max()
    rounding = torch.finfo(q.dtype).eps
    assert out.max() <= (rounding + 2 * in_float32) * largest_v, f"out: error {out.max():.3g}"
    allowed = in_float32 + 2.0**-22 * (1 + truth[1].nan_to_num(neginf=0).abs().max())
    assert lse.max() <= allowed, f"lse: error {lse.max():.3g}, allowed {allowed:.3g}"


def projection_bound(x: Tensor, weights: Tensor) -> Tensor:
    """How far a float32 projection of ``[..., head_dim]`` may be from the exact one.

    A sum of n products in any order is off by at most n u times the sum of their magnitudes. u is
    2^-23, not 2^-24: the adders of tensor cores cut off where others round.
    """
    return x.shape[-1] * 2.0**-23 * (x.double().abs() @ weights.double().abs())


def assert_bits_within_rounding(actual: Tensor, z: Tensor, bound: Tensor) -> None:
    """Bits are the signs of the exact projections z, but where z is within rounding of zero."""
    wrong = (actual != (z > 0)) & (z.abs() > bound)
    assert not wrong.any(), f"{wrong.sum()} bits differ, the first at {wrong.nonzero()[0].tolist()}"


def plain_gather_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    indices: Tensor,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """gather_attention as one would write it in PyTorch in the dtype of q, softmax in float32."""
    batch, q_len, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_cache.shape[2], k_cache.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
    group = num_heads // num_kv_heads
    for b in range(batch):
        for j in range(q_len):
            visible = int(cache_seqlens[b]) - q_len + j + 1
            for h in range(num_kv_heads):
                t = indices[b, j, h].long()
                t = t[(t >= 0) & (t < visible)]
                if len(t) == 0:
                    continue
                pages = block_table[b].long()[t // page_size]
                k, v = k_cache[pages, t % page_size, h], v_cache[pages, t % page_size, h]
                heads = slice(h * group, (h + 1) * group)
                logits = (q[b, j, heads] @ k.T).float() * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                out[b, j, heads] = logits.softmax(-1).to(q.dtype) @ v
                lse[b, j, heads] = logits.logsumexp(-1)
    return out, lse
