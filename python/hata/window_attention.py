"""Attention to a window of positions: which ones a token sees, and a prompt's attention to them."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hata.torch_attention import torch_attention

# A prompt attends at least so many tokens at a time.
MIN_BLOCK_LEN = 512

Position = TypeVar("Position", int, Tensor)


@dataclass(frozen=True)
class Window:
    """Which positions the tokens of a layer see: the last ones, themselves among them.

    Attributes:
        size: How many at most.
        is_chunk: Whether sequences are cut into chunks of ``size`` positions, and a token sees
            those of its own chunk (Llama 4); else it sees the last ``size`` positions (Longformer,
            arXiv 2004.05150, section 3.1; Mistral 7B, arXiv 2310.06825, section 2).
    """

    size: int
    is_chunk: bool = False

    def first(self, token: Position) -> Position:
        """Returns the first position that a token sees; below 0 where that is before the start."""
        return token - token % self.size if self.is_chunk else token - (self.size - 1)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    first_position: int = 0,
    softmax_scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attends causally to a window of positions, with torch's kernels.

    It goes by blocks of tokens, each with the keys that it can see, so that time and memory grow
    with ``seq_len * window.size``.

    Args:
        q: ``[batch, num_heads, q_len, head_dim]``, the last tokens of the sequence.
        k: ``[batch, num_kv_heads, seq_len, head_dim]``.
        v: The same shape.
        window: What a token sees.
        first_position: The position of the first key, which the first query's window reaches.
        softmax_scale: Factor of the logits.
        softcap: Cap of the logits, or None.
        sink_logits: ``[num_heads]``, or None.

    Returns:
        ``[batch, num_heads, q_len, head_dim]`` in q's dtype.
    """
    q_len, seq_len = q.shape[2], k.shape[2]
    block_len, outs = max(window.size, MIN_BLOCK_LEN), []
    first_token, stop = first_position + seq_len - q_len, first_position + seq_len
    for first in range(first_token, stop, block_len):
        last = min(first + block_len, stop)
        start = max(first_position, window.first(first))
        mask = None
        if window.first(last - 1) > start:  # or every token sees all that is before it
            token = torch.arange(first, last, device=q.device)[:, None]
            position = torch.arange(start, last, device=q.device)
            mask = ((position <= token) & (position >= window.first(token)))[None, None]
        outs.append(
            torch_attention(
                q[:, :, first - first_token : last - first_token],
                *(t[:, :, start - first_position : last - first_position] for t in (k, v)),
                softmax_scale=softmax_scale,
                mask=mask,
                is_causal=mask is None,
                softcap=softcap,
                sink_logits=sink_logits,
            )
        )
    return torch.cat(outs, dim=2)
