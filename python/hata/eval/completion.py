"""Completing attention: one more position stands for all those that a token leaves out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hata.selectors import Softmax
from hata.selectors.selector import products


@dataclass(frozen=True)
class Completion:
    """Adds the positions that are left out, as one with their mass and the mean of all values.

    ``out + w (mean V - out)`` with ``w = Z_rest / (Z + Z_rest)``, where Z is the sum of the
    ``exp(logit)`` attended to, a sink's included. What the rest has is estimated for each query
    head: a line is fitted to the logits of the selected positions over their scores, with a slope
    of at least 0, and ``Z_rest`` is the sum of ``exp(line(score))`` over the others. A decoder
    would take that sum from the histogram of the scores that it selects by, and the mean from sums
    of V that it keeps beside the cache.

    An experiment: docs/eval.md says what it gives.

    Attributes:
        cap: The most that ``Z_rest`` may be, as a share of Z.
        least_spread: Heads are completed that attend to so many positions in effect, as a share of
            those that are selected: ``(sum p)**2 / sum p**2`` of their shares p.
        known: Whether ``Z_rest`` is the true one, which takes all logits: what an estimate could
            reach at most.
    """

    cap: float = 0.25
    least_spread: float = 0.0
    known: bool = False

    def rest(
        self,
        q: Tensor,
        k: Tensor,
        scores: Tensor,
        selected: Tensor,
        positions: Tensor,
        softmax: Softmax,
    ) -> Tensor:
        """Computes w, the share of the attention that the rest gets.

        Args:
            q: ``[num_queries, num_kv_heads, group, head_dim]``.
            k: ``[seq_len, num_kv_heads, head_dim]``.
            scores: ``[num_queries, num_kv_heads, seq_len]``, float32: what was selected by.
            selected: The same shape, bool.
            positions: ``[num_queries]``: query i sees ``0..positions[i]``.
            softmax: The layer's.

        Returns:
            ``[num_queries, num_kv_heads, group]``, float32.
        """
        logits = softmax.cap_(products(q, k) * softmax.scale)
        seen = torch.arange(len(k), device=k.device) <= positions[:, None]
        left_out = (seen[:, None] & ~selected)[:, :, None]
        kept = selected[:, :, None]
        of_kept = logits.masked_fill(~kept, -torch.inf)
        mass = of_kept.logsumexp(-1)
        spread = (2 * mass - (2 * of_kept).logsumexp(-1)).exp() / kept.sum(-1)
        if softmax.sink_logits is not None:
            mass = torch.logaddexp(mass, softmax.sink_logits)
        of_rest = logits if self.known else _line(scores[:, :, None], logits, kept)
        of_rest = of_rest.masked_fill(~left_out, -torch.inf).logsumexp(-1)
        share = torch.sigmoid((of_rest - mass).clamp(max=math.log(self.cap)))
        return share.where(spread >= self.least_spread, 0.0)


COMPLETIONS = {
    "estimate": Completion(),
    "cap": Completion(cap=0.05),
    "spread": Completion(least_spread=0.125),
    "known": Completion(cap=math.inf, known=True),
}


def complete(out: Tensor, v: Tensor, rest: Tensor) -> Tensor:
    """Adds what is left out to attention over selected positions.

    Args:
        out: ``[1, q_len, num_heads, head_dim]``.
        v: ``[1, num_kv_heads, seq_len, head_dim]``: the values of all positions, of which the
            queries are at the last.
        rest: ``[q_len, num_kv_heads, group]``, as `Completion.rest` gives it.

    Returns:
        The shape and dtype of ``out``.
    """
    q_len, seq_len = out.shape[1], v.shape[2]
    counts = torch.arange(seq_len - q_len + 1, seq_len + 1, device=v.device)
    sums = v[0].cumsum(1, dtype=torch.float32)[:, -q_len:]
    mean = (sums / counts[:, None]).transpose(0, 1)[:, :, None]
    attended = out[0].unflatten(1, rest.shape[1:]).float()
    completed = attended.lerp(mean.expand_as(attended), rest[..., None])
    return completed.flatten(1, 2)[None].to(out.dtype)


def _line(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """Fits y over x by least squares where ``kept``, with a slope of at least 0; its values."""
    number = kept.sum(-1, keepdim=True)
    x = x - x.where(kept, 0.0).sum(-1, keepdim=True) / number
    mean = y.where(kept, 0.0).sum(-1, keepdim=True) / number
    variance = x.square().where(kept, 0.0).sum(-1, keepdim=True)
    covariance = (x * (y - mean)).where(kept, 0.0).sum(-1, keepdim=True)
    slope = (covariance / variance).clamp(min=0.0).where(variance > 0, 0.0)
    return mean + slope * x
