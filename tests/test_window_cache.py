"""Attention to a sliding window, over a cache that keeps no more than it needs."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_equal, assert_no_worse_than_pytorch
from devices import gpu_only
from hata import window_cache
from hata.window_cache import SPARE_ROWS, Window, WindowCache, window_attention

BATCH, NUM_KV_HEADS, GROUP, HEAD_DIM, MAX_SEQ_LEN = 3, 2, 3, 64, 400
# Layers 0 and 2 share what a step sees.
WINDOWS = (Window(20), Window(33), Window(20), Window(17, is_chunk=True))
SCALE = 0.2


def windowed(q: Tensor, k: Tensor, v: Tensor, window: Window, **logits: Any) -> Tensor:
    """``[q_len, heads, head_dim]`` attends to ``[seq_len, kv_heads, head_dim]``, in q's dtype."""
    q_len, seq_len = q.shape[0], k.shape[0]
    k, v = (t.to(q.dtype).repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    found = torch.einsum("qhd,khd->hqk", q, k).to(torch.promote_types(q.dtype, torch.float32))
    found = found * SCALE
    if logits.get("softcap") is not None:
        found = logits["softcap"] * torch.tanh(found / logits["softcap"])
    token = torch.arange(seq_len - q_len, seq_len, device=q.device)[:, None]
    position = torch.arange(seq_len, device=q.device)
    if window.is_chunk:
        hidden = position // window.size != token // window.size
    else:
        hidden = position <= token - window.size
    found = found.masked_fill((position > token) | hidden, -torch.inf)
    if logits.get("sink_logits") is not None:
        sinks = logits["sink_logits"].to(found.dtype)[:, None, None].expand(-1, q_len, 1)
        found = torch.cat([found, sinks], 2)
    shares = found.softmax(-1)[..., :seq_len].to(q.dtype)
    return torch.einsum("hqk,khd->qhd", shares, v)


@dataclass
class Batch:
    """A `WindowCache`, and all the keys and values that its sequences have had."""

    device: str
    dtype: torch.dtype
    logits: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache = WindowCache(
            WINDOWS,
            batch=BATCH,
            max_seq_len=MAX_SEQ_LEN,
            dtype=self.dtype,
            device=torch.device(self.device),
        )
        empty = torch.empty(0, NUM_KV_HEADS, HEAD_DIM, device=self.device, dtype=self.dtype)
        self.k, self.v = ([[empty] * BATCH for _ in WINDOWS] for _ in range(2))

    def vectors(self, q_len: int, heads: int) -> Tensor:
        return torch.randn(BATCH, q_len, heads, HEAD_DIM).to(self.device, self.dtype)

    def attend(self, q_len: int, *, decodes: bool = False, new: list[int] | None = None) -> None:
        """Brings tokens to every layer and compares what they attend to."""
        for layer_idx, window in enumerate(WINDOWS):
            q = self.vectors(q_len, NUM_KV_HEADS * GROUP)
            k, v = (self.vectors(q_len, NUM_KV_HEADS) for _ in range(2))
            attend = self.cache.decode if decodes else self.cache.prefill
            settings: dict[str, Any] = {} if new is None else {"new_seqlens": new}
            settings |= {"softmax_scale": SCALE, **self.logits}
            out = attend(layer_idx, q, k, v, **settings)
            self.cache.reopen_step(layer_idx)  # as for a layer that shares these keys
            assert_equal(attend(layer_idx, q, k, v, **settings), out)
            for b, count in enumerate(new or [q_len] * BATCH):
                real = slice(q_len - count, q_len)
                assert (out[b, : q_len - count] == 0).all()
                kept = (self.k[layer_idx], self.v[layer_idx])
                for held, x in zip(kept, (k, v), strict=True):
                    held[b] = torch.cat([held[b], x[b, real]])
                if count > 0:
                    keys, values = (held[b] for held in kept)
                    plain, truth = (
                        windowed(each, keys, values, window, **self.logits)
                        for each in (q[b, real], q[b, real].double())
                    )
                    assert_no_worse_than_pytorch(out[b, real], plain, truth)

    def decode(self, *q_lens: int) -> None:
        for q_len in q_lens:
            self.attend(q_len, decodes=True)

    def change(self, lengths: list[int], order: list[int] | None = None) -> None:
        """Cuts the sequences, and reorders them."""
        self.cache.truncate(lengths)
        for held in (*self.k, *self.v):
            held[:] = [rows[:n] for rows, n in zip(held, lengths, strict=True)]
        if order is not None:
            self.cache.reorder(order)
            for held in (*self.k, *self.v):
                held[:] = [held[b] for b in order]
        assert self.cache.seq_lens == [len(rows) for rows in self.k[0]]
        assert self.cache.cache_seqlens.tolist() == self.cache.seq_lens


def sinks(device: str) -> Tensor:
    return torch.randn(NUM_KV_HEADS * GROUP).to(device)


@pytest.mark.parametrize("kind", ["plain", "softcap and sinks"])
def test_every_token_sees_its_window(
    device: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_cache, "MIN_BLOCK_LEN", 64)
    logits = {} if kind == "plain" else {"softcap": 3.0, "sink_logits": sinks(device)}
    batch = Batch(device, dtype, logits)
    for q_len in (9, 50, 1):  # prompts shorter and longer than windows, and after others
        batch.attend(q_len)
    batch.decode(1, 1, 4)
    batch.attend(250)  # longer than the rows, and than a block of tokens
    batch.decode(1, 7, 1)


def test_prompts_of_different_lengths(device: str) -> None:
    batch = Batch(device, torch.float16)
    for new in ([40, 7, 0], [0, 9, 3], [200, 1, 160]):
        batch.attend(max(new), new=new)
        batch.decode(1, 3)
    batch.decode(*[1] * 40)


def test_tokens_are_taken_back_and_sequences_reordered(device: str) -> None:
    batch = Batch(device, torch.float16)
    batch.attend(30)
    assert batch.cache.num_removable == 30
    batch.change([30, 11, 0])
    batch.decode(1, 1)
    batch.attend(180, new=[180, 170, 180])
    # Of the 160 rows of layers 0 and 2 the next token needs 19.
    removed = batch.cache.num_removable
    assert removed == 160 - 19
    with pytest.raises(ValueError, match=rf"truncate: lengths must take at most {removed} tokens"):
        batch.cache.truncate([n - removed - 1 for n in batch.cache.seq_lens])
    batch.change([n - 20 for n in batch.cache.seq_lens], order=[2, 2, 0])
    assert batch.cache.num_removable == removed - 20
    batch.decode(5, 1)
    batch.change([n - 3 for n in batch.cache.seq_lens], order=[1, 0, 2])
    batch.decode(1)
    batch.cache.reset()
    assert batch.cache.seq_lens == [0] * BATCH


def test_its_memory_is_the_windows_and_not_the_lengths(device: str) -> None:
    batch = Batch(device, torch.float16)
    batch.attend(1)
    rows = [k.shape[0] * k.shape[1] // BATCH for k, _ in batch.cache._rows.values()]
    for num_rows, window in zip(rows, WINDOWS, strict=True):
        least = window.size + SPARE_ROWS
        assert least <= num_rows < least + window_cache.PAGE_SIZE


def test_a_step_brings_as_many_tokens_to_every_layer(device: str) -> None:
    batch = Batch(device, torch.float16)
    q, k = batch.vectors(2, NUM_KV_HEADS), batch.vectors(2, NUM_KV_HEADS)
    batch.cache.decode(0, q, k, k, softmax_scale=1.0)
    with pytest.raises(ValueError, match="layer 1 must bring the new tokens of the open step"):
        batch.cache.decode(1, *(x[:, :1] for x in (q, k, k)), softmax_scale=1.0)
    with pytest.raises(ValueError, match="sequence lengths must be at most max_seq_len=400"):
        Batch(device, torch.float16).attend(401)
    long = batch.vectors(SPARE_ROWS + 1, NUM_KV_HEADS)
    with pytest.raises(ValueError, match=rf"decode: q must have at most {SPARE_ROWS} tokens"):
        batch.cache.decode(1, long, long, long, softmax_scale=1.0)


@pytest.mark.parametrize("is_chunk", [False, True])
def test_blocks_of_a_prompt_are_as_one(is_chunk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.float64) for n in (90, 100, 100))
    settings: dict[str, Any] = {"window": Window(17, is_chunk), "softmax_scale": 0.3}
    settings["first_position"] = 34
    whole = window_attention(q, k, v, **settings)
    monkeypatch.setattr(window_cache, "MIN_BLOCK_LEN", 1)
    torch.testing.assert_close(window_attention(q, k, v, **settings), whole)


@gpu_only
@pytest.mark.parametrize("q_len", [1, 3])
def test_a_graph_replays_for_every_length(q_len: int) -> None:
    held = [Batch("cuda", torch.bfloat16), Batch("cuda", torch.bfloat16)]
    tokens = [held[0].vectors(q_len, heads) for heads in (GROUP * NUM_KV_HEADS, 2, 2)]

    def run(cache: WindowCache) -> list[Tensor]:
        return [cache.decode(i, *tokens, softmax_scale=SCALE) for i in range(len(WINDOWS))]

    for batch in held:
        torch.manual_seed(1)
        batch.attend(25, new=[25, 3, 18])
        run(batch.cache)
    eager, replayed = (batch.cache for batch in held)
    graph = torch.cuda.CUDAGraph()
    replayed.extend(q_len)
    with torch.cuda.graph(graph):
        out = run(replayed)
    for i in range(100):
        if i > 0:
            replayed.extend(q_len)
        for t in tokens:
            t.copy_(torch.randn_like(t))
        graph.replay()
        replayed.close_step()
        for a, b in zip(out, run(eager), strict=True):
            assert_equal(a, b)
