"""The cache of layers with a sliding window or chunks, of a fixed size, and attention over it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hata import ops
from hata.checks import check
from hata.sequences import Sequences
from hata.torch_attention import add_sink_logits, torch_attention

# Rows of a sequence beside its window: those of a draft, and those that `truncate` may take back.
SPARE_ROWS = 128
PAGE_SIZE = 16
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


class WindowCache:
    """Keys and values of the last positions, for layers whose tokens see a `Window` of them.

    Position t of a sequence lies in row ``t % num_rows``: pages are handed out once and for all,
    in turn, by a block table that repeats them. The attention operators read lengths and block
    table from the device, so that a CUDA graph of `decode` replays for sequences of every length.

    As in a `hata.HataCache`, a *step* adds tokens to the sequences: the first layer that attends
    opens it, or `extend` does, and every layer must then bring as many. The buffers of a layer are
    made when its first keys come, and keep their addresses.

    Attributes:
        windows: What the tokens of each layer see, ``[num_layers]``.
        cache_seqlens: ``[batch]``, int32: positions so far, those of the last step included.

    Args:
        windows: The windows.
        batch: Sequences.
        max_seq_len: Positions that a sequence can have.
        dtype: float16, bfloat16 or (on the CPU) float32.
        device: Where the cache lies.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        *,
        batch: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.windows = tuple(windows)
        self.batch, self.dtype, self.device = batch, dtype, device
        self._sequences = Sequences(
            batch=batch,
            num_layers=len(self.windows),
            max_seq_len=max_seq_len,
            pool=None,
            device=device,
        )
        self.cache_seqlens = self._sequences.cache_seqlens
        self._longest = [0] * batch  # lengths that sequences had, of whose rows some may be lost
        self._num_pages = {
            window: -(-min(max_seq_len, window.size + SPARE_ROWS) // PAGE_SIZE)
            for window in set(self.windows)
        }
        self._tables = {
            window: self._block_table(num_pages, max_seq_len)
            for window, num_pages in self._num_pages.items()
        }
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}  # of each layer
        self._seen: dict[Window, tuple[Tensor, Tensor]] = {}  # `_window_rows` of this step
        self._past: dict[int, list[tuple[Tensor, Tensor]]] = {}  # what `_append` has read last
        self._reopened: set[int] = set()  # layers whose rows hold the step's tokens already

    def _block_table(self, num_pages: int, max_seq_len: int) -> Tensor:
        pages = torch.arange(-(-max_seq_len // PAGE_SIZE), device=self.device) % num_pages
        first = torch.arange(self.batch, device=self.device) * num_pages
        return (first[:, None] + pages).int()

    @property
    def seq_lens(self) -> list[int]:
        """``cache_seqlens`` as the host knows it, ``[batch]``."""
        return list(self._sequences.seq_lens)

    @property
    def num_removable(self) -> int:
        """Last tokens that `truncate` can take from every sequence."""
        shortest = [0] * self.batch
        for window, num_pages in self._num_pages.items():
            num_rows = num_pages * PAGE_SIZE
            # The positions longest - num_rows and later are there, unless all are; the next token
            # needs at most the last window.size - 1 of those that stay.
            for b, longest in enumerate(self._longest):
                if longest > num_rows:
                    shortest[b] = max(shortest[b], longest - num_rows + window.size - 1)
        return min(n - least for n, least in zip(self.seq_lens, shortest, strict=True))

    def extend(self, new: int) -> None:
        """Opens a step of ``new`` tokens in every sequence, as `hata.HataCache.extend` does."""
        self._sequences.open("WindowCache.extend", [new] * self.batch)
        self._note_lengths()

    def reopen_step(self, layer_idx: int) -> None:
        """Lets a layer bring the tokens of the last step once more, as `hata.HataCache` does."""
        self._sequences.reopen(layer_idx)
        self._reopened.add(layer_idx)

    def close_step(self) -> None:
        """Says that every layer has filled the open step, as replays of a graph have."""
        self._sequences.close()

    def reset(self) -> None:
        """Empties every sequence."""
        self._longest = [0] * self.batch
        self._sequences.resize("WindowCache.reset", [0] * self.batch)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Cuts every sequence to a length, which takes at most ``num_removable`` tokens from it.

        Raises:
            ValueError: A length is negative, longer than its sequence or too short.
        """
        where, lens = "WindowCache.truncate", self.seq_lens
        kept = self._sequences.counts(where, "lengths", lengths, self._sequences.max_seq_len)
        limit = self.num_removable
        fits = all(old - limit <= n <= old for n, old in zip(kept, lens, strict=True))
        check(fits, where, "lengths", f"take at most {limit} tokens from {lens}", kept)
        self._sequences.check_step_filled(where)
        self._sequences.resize(where, kept)

    def reorder(self, batch_idx: Sequence[int] | Tensor) -> None:
        """Lets sequence b continue as the old sequence ``batch_idx[b]``, as beam search wants.

        Raises:
            TypeError: ``batch_idx`` holds no ints.
            ValueError: There are not ``batch`` of them, or one is out of range.
        """
        where = "WindowCache.reorder"
        order = self._sequences.counts(where, "batch_idx", batch_idx, self.batch - 1)
        sources, copies = self._sequences.reorder(where, order)
        self._longest = [self._longest[old] for old in order]
        if sources:
            old, new = (self._sequences.to_device(batch).long() for batch in (sources, copies))
            for t in itertools.chain.from_iterable(self._rows.values()):
                rows = self._by_sequence(t)
                rows[new] = rows[old]

    @torch.no_grad()
    def prefill(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        new_seqlens: Sequence[int] | None = None,
    ) -> Tensor:
        """Appends a prompt, or the next chunk of one; each token attends to its window.

        Args:
            layer_idx: The layer.
            q: ``[batch, q_len, num_heads, head_dim]``, after the rotary embedding.
            k: ``[batch, q_len, num_kv_heads, head_dim]``, likewise.
            v: The same shape.
            softmax_scale: Factor of the logits.
            softcap: Cap of the logits, or None.
            sink_logits: ``[num_heads]``, or None.
            new_seqlens: ``[batch]`` ints: only the last ``new_seqlens[b]`` tokens of sequence b are
                real, those before are left padding. None: all are.

        Returns:
            ``[batch, q_len, num_heads, head_dim]`` in q's dtype; zeros for padding.

        Raises:
            ValueError: The cache has no room, or the tokens are not those of the step.
        """
        where, q_len = "WindowCache.prefill", k.shape[1]
        new = [q_len] * self.batch if new_seqlens is None else list(new_seqlens)
        with self._sequences.filling(where, layer_idx, new):
            self._note_lengths()
            before = [n - count for n, count in zip(self.seq_lens, new, strict=True)]
            alike = new == [q_len] * self.batch and len(set(before)) == 1
            parts = [slice(None)] if alike else [slice(b, b + 1) for b in range(self.batch)]
            if layer_idx not in self._reopened:
                self._past[layer_idx] = [
                    self._read_past(layer_idx, k, part, before[part][0]) for part in parts
                ]
            self._reopened.discard(layer_idx)
            out = torch.empty_like(q) if alike else torch.zeros_like(q)
            for part, past in zip(parts, self._past[layer_idx], strict=True):
                count = new[part][0]
                if count == 0:
                    continue
                chosen = (part, slice(q_len - count, q_len))
                start = before[part][0]
                keys, values = self._append(layer_idx, k[chosen], v[chosen], part, start, past)
                attended = window_attention(
                    *(x.transpose(1, 2) for x in (q[chosen], keys, values)),
                    window=self.windows[layer_idx],
                    first_position=self.seq_lens[part][0] - keys.shape[1],
                    softmax_scale=softmax_scale,
                    softcap=softcap,
                    sink_logits=sink_logits,
                )
                out[chosen] = attended.transpose(1, 2)
        return out

    @torch.no_grad()
    def decode(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Appends the new tokens of every sequence; each attends to its window.

        Lengths are the device's, so that a CUDA graph can hold it: call `extend` and this function
        once to warm up, capture this function, and then, for every further token, call `extend` and
        replay.

        Args:
            layer_idx: The layer.
            q: ``[batch, q_len, num_heads, head_dim]``, after the rotary embedding; at most
                `SPARE_ROWS` tokens.
            k: ``[batch, q_len, num_kv_heads, head_dim]``, likewise.
            v: The same shape.
            softmax_scale: Factor of the logits.
            softcap: Cap of the logits, or None.
            sink_logits: ``[num_heads]``, or None.

        Returns:
            ``[batch, q_len, num_heads, head_dim]`` in q's dtype.

        Raises:
            ValueError: The cache has no room, or the tokens are not those of the step.
        """
        where, q_len, window = "WindowCache.decode", k.shape[1], self.windows[layer_idx]
        check(q_len <= SPARE_ROWS, where, "q", f"have at most {SPARE_ROWS} tokens", q_len)
        with self._sequences.filling(where, layer_idx, [q_len] * self.batch):
            self._note_lengths()
            self._past.pop(layer_idx, None)
            self._reopened.discard(layer_idx)
            rows = self._rows_for(layer_idx, k)
            if layer_idx == self.windows.index(window):  # the first of those that share it
                self._seen[window] = self._window_rows(window, q_len, k.shape[2])
            places, indices = self._seen[window]
            for cached, x in zip(rows, (k, v), strict=True):
                cached.flatten(0, 1).index_copy_(0, places, x.flatten(0, 1))
            out, lse = ops.gather_attention(
                q,
                *rows,
                self._tables[window],
                self.cache_seqlens,
                indices,
                softmax_scale=softmax_scale,
                softcap=softcap,
            )
        if sink_logits is not None:
            add_sink_logits(out, lse, sink_logits)
        return out

    def _window_rows(self, window: Window, q_len: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """Returns the rows of the step's tokens, and the positions that each of them sees.

        Returns:
            rows ``[batch * q_len]`` of all sequences', and positions ``[batch, q_len, num_kv_heads,
            window.size]``, int32; those before the start and after a token are none.
        """
        num_rows = self._num_pages[window] * PAGE_SIZE
        offset = torch.arange(-q_len, 0, device=self.device)
        positions = self.cache_seqlens[:, None] + offset
        first = torch.arange(self.batch, device=self.device)[:, None] * num_rows
        offsets = torch.arange(window.size, dtype=torch.int32, device=self.device)
        seen = window.first(positions).int()[:, :, None, None] + offsets
        rows = (first + positions % num_rows).flatten()
        return rows, seen.expand(-1, -1, num_kv_heads, -1).contiguous()

    def _read_past(
        self, layer_idx: int, k: Tensor, part: slice, before: int
    ) -> tuple[Tensor, Tensor]:
        """Copies what the window of the next token of some sequences holds before it.

        Args:
            layer_idx: The layer.
            k: Keys of new tokens, for their shape.
            part: The sequences.
            before: Their length.

        Returns:
            Keys and values, ``[batch, 0..window.size - 1, num_kv_heads, head_dim]``.
        """
        window = self.windows[layer_idx]
        num_rows = self._num_pages[window] * PAGE_SIZE
        first = max(0, window.first(before))
        past = torch.arange(first, before, device=self.device) % num_rows
        rows = (self._by_sequence(cached)[part] for cached in self._rows_for(layer_idx, k))
        keys, values = (each.index_select(1, past) for each in rows)
        return keys, values

    def _append(
        self,
        layer_idx: int,
        k: Tensor,
        v: Tensor,
        part: slice,
        before: int,
        past: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens of some sequences, which had ``before`` of them.

        Returns:
            Their keys and values, after those of ``past``.
        """
        num_rows = self._num_pages[self.windows[layer_idx]] * PAGE_SIZE
        new = torch.arange(before, before + k.shape[1], device=self.device)[-num_rows:] % num_rows
        found = []
        for cached, x, held in zip(self._rows_for(layer_idx, k), (k, v), past, strict=True):
            self._by_sequence(cached)[part].index_copy_(1, new, x[:, -num_rows:])
            found.append(torch.cat([held, x], 1) if held.shape[1] > 0 else x)
        return found[0], found[1]

    def _rows_for(self, layer_idx: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a layer's keys and values, ``[num_pages, PAGE_SIZE, num_kv_heads, head_dim]``."""
        if layer_idx not in self._rows:
            num_pages = self.batch * self._num_pages[self.windows[layer_idx]]
            shape = (num_pages, PAGE_SIZE, *k.shape[2:])
            rows = torch.zeros((2, *shape), dtype=self.dtype, device=self.device)
            self._rows[layer_idx] = (rows[0], rows[1])
        return self._rows[layer_idx]

    def _by_sequence(self, rows: Tensor) -> Tensor:
        """Views a layer's rows as ``[batch, num_rows, num_kv_heads, head_dim]``."""
        return rows.view(self.batch, -1, *rows.shape[2:])

    def _note_lengths(self) -> None:
        both = zip(self._longest, self._sequences.seq_lens, strict=True)
        self._longest = [max(longest, length) for longest, length in both]


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
