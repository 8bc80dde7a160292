"""Capped logits and sink logits: in prompts, and in decoding, dense and sparse."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hata
from attention_model import DENSE, EVERYTHING, FEW, SPARSE, assert_attends, fill, queries, single
from cache_model import make_cache, new_tokens
from closeness import assert_equal
from devices import gpu_only
from hata import HataCache, HataConfig, torch_attention
from hata.torch_attention import add_sink_logits

SINKS = torch.tensor([3.0, -2.0, 0.3, 5.0, -30.0, -torch.inf])
# A small cap, so that it matters to logits of random vectors.
CASES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sink_logits": SINKS},
    "both": {"softcap": 1.5, "sink_logits": SINKS},
}


def on_device(name: str, cache: HataCache) -> dict[str, Any]:
    logits = dict(CASES[name])
    if "sink_logits" in logits:
        logits["sink_logits"] = logits["sink_logits"].to(cache.device)
    return logits


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_logits", [torch_attention.MAX_LOGITS, 400])
def test_prefill_in_chunks_and_ragged(
    device: str, dtype: torch.dtype, name: str, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_attention, "MAX_LOGITS", max_logits)
    cache = make_cache(device, dtype, config=EVERYTHING, page_size=16)
    logits = on_device(name, cache)
    for new in ([17] * 3, [1] * 3, [20] * 3, [9, 4, 0]):
        q_len = max(new)
        q, (k, v) = queries(cache, q_len), new_tokens(cache, q_len)
        for layer_idx in (DENSE, SPARSE):
            out = hata.prefill(q, k, v, cache, layer_idx, new_seqlens=new, **logits)
        for b, count in enumerate(new):
            row = (slice(b, b + 1), slice(q_len - count, None))
            assert_attends(out[row], q[row], single(cache, b), SPARSE, **logits)
            assert (out[b, : q_len - count] == 0).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("min_sparse_len", [0, 20])
def test_decoding(
    device: str, dtype: torch.dtype, q_len: int, name: str, min_sparse_len: int
) -> None:
    config = HataConfig(
        top_k=9, num_sink=2, num_recent=3, num_dense_layers=1, min_sparse_len=min_sparse_len
    )
    cache = make_cache(device, dtype, config=config, page_size=16)
    logits = on_device(name, cache)
    fill(cache, 30, [30, 8, 1])
    for _ in range(2):
        q, (k, v) = queries(cache, q_len), new_tokens(cache, q_len)
        out = hata.decode_attention(q, k, v, cache, DENSE, **logits)
        assert_attends(out, q, cache, DENSE, **logits)
        out = hata.decode_attention(q, k, v, cache, SPARSE, **logits)
        indices = cache.last_selection(SPARSE)[0].clone()
        assert_attends(out, q, cache, SPARSE, indices, **logits)


def test_neither_changes_what_is_selected(device: str) -> None:
    cache = make_cache(device, torch.float16, config=FEW)
    fill(cache, 40)
    q, (k, v) = queries(cache, 2), new_tokens(cache, 2)
    selections = []
    for logits in ({}, on_device("both", cache)):
        for layer_idx in (DENSE, SPARSE):
            hata.decode_attention(q, k, v, cache, layer_idx, **logits)
        selections.append(cache.last_selection(SPARSE)[0].clone())
        cache.truncate(40)
    assert_equal(*selections)


def test_a_sink_is_a_set_of_keys_without_values(device: str, dtype: torch.dtype) -> None:
    out = torch.randn(2, 3, 6, 64).to(device, dtype)
    lse = torch.randn(2, 3, 6).to(device)
    lse[0, 1] = -torch.inf  # it has seen no key
    out[0, 1] = 0
    sinks = SINKS.clamp(min=-50).to(device, dtype)
    expected = hata.merge_attention_states(
        *(out, lse, torch.zeros_like(out), sinks.float().expand_as(lse).contiguous())
    )
    add_sink_logits(out, lse, sinks)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(out, expected[0], **tolerance)
    torch.testing.assert_close(lse, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["causal", "bool", "float", "heads"])
def test_gradients_are_those_of_plain_attention(name: str, kind: str) -> None:
    q, k, v = (torch.randn(2, heads, 7, 16, dtype=torch.double) for heads in (6, 2, 2))
    logits = dict(CASES[name])
    tensors = [q, k, v]
    if "sink_logits" in logits:
        logits["sink_logits"] = logits["sink_logits"].clone()
        tensors.append(logits["sink_logits"])
    for tensor in tensors:
        tensor.requires_grad_()
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    mask: Tensor | None = None
    if kind != "causal":
        seen = seen.triu(-3)
        mask = seen[None, None]
    if kind == "heads":
        seen = torch.stack([seen.triu(-window) for window in range(1, 7)])
        mask = seen[None]
    if kind == "float":
        mask = torch.zeros(1, 1, 7, 7, dtype=torch.double).masked_fill(~seen, -torch.inf)

    found = torch_attention.torch_attention(
        *(q, k, v), softmax_scale=0.3, mask=mask, is_causal=kind == "causal", **logits
    )
    plain = q @ k.repeat_interleave(3, 1).mT * 0.3
    if "softcap" in logits:
        plain = 1.5 * torch.tanh(plain / 1.5)
    plain = plain.masked_fill(~seen, -torch.inf)
    if "sink_logits" in logits:
        sinks = logits["sink_logits"].double()[:, None, None].expand(2, 6, 7, 1)
        plain = torch.cat([plain, sinks], -1)
    expected = plain.softmax(-1)[..., :7] @ v.repeat_interleave(3, 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weight).sum(), tensors) for out in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@gpu_only
def test_a_captured_step_has_both() -> None:
    eager, captured = (make_cache("cuda", torch.bfloat16, config=FEW) for _ in range(2))
    for cache in (eager, captured):
        torch.manual_seed(1)
        fill(cache, 20, [20, 8, 1])
    logits = on_device("both", eager)
    q, (k, v) = queries(eager, 1), new_tokens(eager, 1)

    def step(cache: HataCache) -> list[Tensor]:
        layers = (DENSE, SPARSE)
        return [hata.decode_attention(q, k, v, cache, layer, **logits) for layer in layers]

    for cache in (eager, captured):
        step(cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step(captured)
    for _ in range(3):
        captured.extend(1)
        graph.replay()
        for actual, expected in zip(outs, step(eager), strict=True):
            assert_equal(actual, expected)
