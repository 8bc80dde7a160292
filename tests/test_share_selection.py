"""Layers that attend to what an earlier layer has selected."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hata
from closeness import assert_equal
from hata import HashWeights, HataCache, HataConfig, reference
from hata.integrations.transformers import CACHE_ARGUMENT, enable
from hata.offload import OffloadedCache
from tiny_models import HEAD_DIM, NUM_LAYERS, generate, make_model, make_weights, random_prompt

NUM_KV_HEADS, GROUP, BATCH, CAPACITY = 2, 3, 2, 80
BUDGET: dict[str, Any] = {"top_k": 12, "num_sink": 2, "num_recent": 4, "min_sparse_len": 0}
CONFIG = HataConfig(num_dense_layers=1, share_selection=(1, 4), **BUDGET)  # layers 2, 3 and 5 share
WEIGHTS = HashWeights.random(num_layers=6, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)


def tokens(device: str, q_len: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = (NUM_KV_HEADS * GROUP, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (torch.randn(BATCH, q_len, n, HEAD_DIM).half().to(device) for n in heads)
    return q, k, v


def make_cache(device: str, kind: str, config: HataConfig = CONFIG) -> HataCache:
    settings = {"batch": BATCH, "max_seq_len": CAPACITY, "dtype": torch.float16, "device": device}
    if kind == "offloaded":
        return OffloadedCache(WEIGHTS, config, host_memory=2**30, page_size=16, **settings)
    page_size = 16 if kind == "paged" else None
    return HataCache(WEIGHTS, config, page_size=page_size, **settings)


def prefilled(cache: HataCache) -> HataCache:
    for layer_idx in range(cache.num_layers):
        hata.prefill(*tokens(str(cache.device), 60), cache, layer_idx)
    return cache


def test_every_nth_sparse_layer_selects_or_those_that_are_named() -> None:
    assert HataConfig().selecting_layers(4) == (0, 1, 2, 3)
    assert HataConfig(share_selection=3).selecting_layers(9) == (0, 1, 2, 2, 2, 5, 5, 5, 8)
    named = HataConfig(share_selection=[2, 3, 6])  # as JSON has it
    assert named.selecting_layers(8) == (0, 1, 2, 3, 3, 3, 6, 6)
    assert HataConfig(num_dense_layers=4, share_selection=()).selecting_layers(3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (0, "share_selection must be at least 1, got 0"),
        ((3, 2), "share_selection must name each layer once, in ascending order"),
        ((3,), "share_selection must name the first sparse layer, 2, got (3,)"),
        ((2, 6), "share_selection must name layers below num_layers=6, got (2, 6)"),
    ],
)
def test_what_does_not_say_which_layers_select(chosen: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HataConfig(share_selection=chosen).selecting_layers(6)


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("kind", ["contiguous", "paged", "offloaded"])
def test_layers_attend_to_what_an_earlier_one_has_selected(
    device: str, kind: str, q_len: int
) -> None:
    cache = prefilled(make_cache(device, kind))
    assert [codes is None for codes in cache.code_cache] == [i in (2, 3, 5) for i in range(6)]
    for _ in range(2):
        for layer_idx, selecting in enumerate((0, 1, 1, 1, 4, 4)):
            q, k, v = tokens(device, q_len)
            out = hata.decode_attention(q, k, v, cache, layer_idx)
            if layer_idx == 0:
                continue
            indices, num_selected = cache.last_selection(layer_idx)
            for shared, own in zip(
                (indices, num_selected), cache.last_selection(selecting), strict=True
            ):
                assert_equal(shared, own)
            keys, values = (t.cpu() for t in cache.keys_values(layer_idx))
            assert_equal(keys[:, -q_len:], k.cpu())
            seq_len = keys.shape[1]
            table = torch.arange(BATCH, dtype=torch.int32)[:, None]
            lengths = torch.full((BATCH,), seq_len, dtype=torch.int32)
            expected, _ = reference.gather_attention(
                *(q.cpu().double(), keys.double(), values.double(), table, lengths, indices.cpu())
            )
            torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("min_sparse_len", [50, 100])  # of sequences of 61 and 31 positions
def test_short_sequences_attend_to_everything(device: str, min_sparse_len: int) -> None:
    config = replace(CONFIG, min_sparse_len=min_sparse_len)
    cache = make_cache(device, "paged", config)
    for layer_idx in range(cache.num_layers):
        hata.prefill(*tokens(device, 60), cache, layer_idx, new_seqlens=[60, 30])
    for layer_idx in range(cache.num_layers):
        q, k, v = tokens(device, 1)
        out = hata.decode_attention(q, k, v, cache, layer_idx)
        for b in range(1 if min_sparse_len < 61 else 0, BATCH):
            rows = cache.keys_values(layer_idx, b)
            keys, values = (t[0].repeat_interleave(GROUP, 1).float() for t in rows)
            shares = (torch.einsum("hd,shd->hs", q[b, 0].float(), keys) / HEAD_DIM**0.5).softmax(-1)
            expected = torch.einsum("hs,shd->hd", shares, values)
            torch.testing.assert_close(out[b, 0].float(), expected, rtol=0, atol=2e-3)
            if layer_idx > 0:
                assert int(cache.last_selection(layer_idx)[1][b].min()) == cache.seq_lens[b]


def test_a_selection_must_be_of_the_same_step(device: str) -> None:
    cache = prefilled(make_cache(device, "contiguous"))
    step = tokens(device, 1)
    for layer_idx in range(6):
        hata.decode_attention(*step, cache, layer_idx)
    lengths = cache.seq_lens
    with pytest.raises(ValueError, match="layer 2 must follow layer 1, whose selection it shares"):
        hata.decode_attention(*step, cache, 2)
    assert cache.seq_lens == lengths
    hata.decode_attention(*step, cache, 1, dense=True)
    with pytest.raises(ValueError, match="layer 3 must follow layer 1, whose selection it shares"):
        hata.decode_attention(*step, cache, 3)


def test_beams_move_layers_without_codes(device: str) -> None:
    cache = prefilled(make_cache(device, "paged"))
    expected = [cache.keys_values(2, 1)[0].clone()] * 2
    cache.reorder([1, 1])
    assert_equal(torch.cat([cache.keys_values(2, b)[0] for b in range(2)]), torch.cat(expected))


@pytest.mark.parametrize("settings", [{}, {"page_size": 16}])
def test_a_model_attends_to_shared_selections(device: str, settings: dict[str, Any]) -> None:
    """Captured in CUDA graphs where there is a GPU, as eager decoding with an observer is not."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = make_model("llama-group4", device, dtype)
    prompt = random_prompt(2, 70).to(device)
    seen: dict[int, list[Tensor]] = {layer_idx: [] for layer_idx in range(NUM_LAYERS)}

    def observe(layer_idx: int, q: Tensor, cache: HataCache, *selection: Tensor) -> None:
        seen[layer_idx].append(selection[0].clone())

    config = HataConfig(num_dense_layers=0, share_selection=2, **BUDGET)
    texts = []
    for observer in (observe, None):
        cache = enable(
            model,
            config,
            weights=make_weights(model),
            max_seq_len=128,
            observer=observer,
            **settings,
        )
        texts.append(generate(model, prompt, 12, **{CACHE_ARGUMENT: cache}))
    assert len(seen[0]) == 11
    assert_equal(torch.stack(seen[1]), torch.stack(seen[0]))
    assert not torch.equal(torch.stack(seen[2]), torch.stack(seen[0]))
    assert_equal(*texts)


def test_a_model_names_layers_that_it_has() -> None:
    model = make_model("llama-group4")
    config = HataConfig(share_selection=(2, 5))
    rule = r"share_selection must name layers that attend to the whole context, \[0, 1, 2\], got"
    with pytest.raises(ValueError, match=rule):
        enable(model, config, weights=make_weights(model))
