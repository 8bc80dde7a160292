from dataclasses import replace

import pytest
import torch

import hata
from attention_model import (
    DENSE,
    EVERYTHING,
    FEW,
    SPARSE,
    assert_attends,
    fill,
    queries,
    single,
)
from cache_model import WEIGHTS, contents, make_cache, new_tokens
from closeness import assert_equal
from devices import gpu_only
from hata import HashWeights, HataCache, HataConfig, reference

PAGE_SIZES = [None, 1, 16]
GROUPS = [1, 3, 4]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group", GROUPS)
def test_prefill_is_causal_attention_in_any_chunks(
    device: str, dtype: torch.dtype, group: int, page_size: int | None
) -> None:
    cache = make_cache(device, dtype, config=EVERYTHING, page_size=page_size)
    for q_len in (17, 1, 20):
        q, (k, v) = queries(cache, q_len, group), new_tokens(cache, q_len)
        for layer_idx in (DENSE, SPARSE):
            out = hata.prefill(q, k, v, cache, layer_idx)
            assert_attends(out, q, cache, layer_idx)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_prefill_of_a_ragged_batch(device: str, dtype: torch.dtype, page_size: int | None) -> None:
    cache = make_cache(device, dtype, config=EVERYTHING, page_size=page_size)
    for new in ([20, 7, 0], [0, 9, 9], [3, 1, 9]):
        q, (k, v) = queries(cache, max(new)), new_tokens(cache, max(new))
        padding = torch.arange(max(new)) < max(new) - torch.tensor(new)[:, None]
        for t in (q, k, v):
            t[padding.to(device)] = torch.nan
        out = hata.prefill(q, k, v, cache, DENSE, new_seqlens=new)
        hata.prefill(q, k, v, cache, SPARSE, new_seqlens=new)
        assert (out[padding.to(device)] == 0).all()
        for b, count in enumerate(new):
            if count > 0:
                kept = slice(max(new) - count, None)
                alone = single(cache, b)
                assert_attends(out[b : b + 1, kept], q[b : b + 1, kept], alone, DENSE)


def test_what_a_sequence_left_behind_does_not_leak(device: str) -> None:
    cache = make_cache(device, torch.float16, config=EVERYTHING)
    k, v = (torch.full_like(t, torch.nan) for t in new_tokens(cache, 40))
    for layer_idx in (DENSE, SPARSE):
        hata.prefill(queries(cache, 40), k, v, cache, layer_idx)
    cache.reset()
    fill(cache, 12, [12, 5, 1])
    q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
    for layer_idx in (DENSE, SPARSE):
        out = hata.decode_attention(q, k, v, cache, layer_idx)
        assert_attends(out, q, cache, layer_idx)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("q_len", [1, 4])
def test_decoding_with_everything_selected_is_dense_attention(
    device: str, dtype: torch.dtype, q_len: int, group: int, page_size: int | None
) -> None:
    cache = make_cache(device, dtype, config=EVERYTHING, page_size=page_size)
    fill(cache, 30, [30, 8, 1])
    for _ in range(3):
        q, (k, v) = queries(cache, q_len, group), new_tokens(cache, q_len)
        for layer_idx in (DENSE, SPARSE):
            out = hata.decode_attention(q, k, v, cache, layer_idx)
            assert_attends(out, q, cache, layer_idx)
    assert cache.seq_lens == [30 + 3 * q_len, 8 + 3 * q_len, 1 + 3 * q_len]


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        (WEIGHTS, FEW),
        (
            replace(WEIGHTS, query_bits=1, key_norms=True),
            replace(FEW, num_dense_layers=0, num_sink=4, num_recent=1),
        ),
        (replace(WEIGHTS, query_bits=2), replace(FEW, top_k=1, num_sink=0, num_recent=1)),
    ],
    ids=["asymmetric", "paper", "one"],
)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("q_len", [1, 3])
def test_decoding_attends_to_the_reference_selection(
    device: str,
    dtype: torch.dtype,
    q_len: int,
    page_size: int | None,
    weights: HashWeights,
    config: HataConfig,
) -> None:
    shape = {"config": config, "weights": weights, "page_size": page_size}
    cache = make_cache(device, dtype, **shape, record_cuts=True)
    fill(cache, 40, [40, 11, 2])
    q, (k, v) = queries(cache, q_len), new_tokens(cache, q_len)
    for layer_idx in (DENSE, SPARSE):
        out = hata.decode_attention(q, k, v, cache, layer_idx)
    indices, _ = selected = cache.last_selection(SPARSE)
    _, query_weights = weights.layer(SPARSE, dtype, cache.device)
    expected = reference.score_select(
        hata.encode_query(q, query_weights, query_bits=weights.query_bits),
        cache.code_cache[SPARSE],
        cache.norm_cache[SPARSE],
        cache.block_table,
        cache.cache_seqlens,
        weight_sum=hata.plane_weight_sum(weights.query_bits, 3),
        top_k=config.top_k,
        num_sink=config.num_sink,
        num_recent=config.num_recent,
        return_cut=True,
    )
    for a, e in zip((*selected, *cache.last_cut(SPARSE)), expected, strict=True):
        assert_equal(a, e.to(device))
    assert_attends(out, q, cache, SPARSE, indices)


def test_untied_query_weights_are_used(device: str) -> None:
    random = HashWeights.random(num_layers=2, num_kv_heads=2, head_dim=64, num_bits=64, seed=1)
    untied = HashWeights(WEIGHTS.key_weights, random.key_weights)
    selections = []
    for weights in (WEIGHTS, untied):
        torch.manual_seed(1)
        cache = make_cache(device, torch.float16, config=FEW, weights=weights)
        fill(cache, 40)
        q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
        for layer_idx in (DENSE, SPARSE):
            hata.decode_attention(q, k, v, cache, layer_idx)
        selections.append(cache.last_selection(SPARSE)[0].clone())
    assert not torch.equal(*selections)


def test_the_scale_of_the_softmax_is_passed_on(device: str) -> None:
    cache = make_cache(device, torch.float16, config=EVERYTHING)
    fill(cache, 20)
    q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
    for layer_idx in (DENSE, SPARSE):
        out = hata.decode_attention(q, k, v, cache, layer_idx, softmax_scale=0.5)
        assert_attends(out, q, cache, layer_idx, softmax_scale=0.5)


def test_gradients_are_not_recorded(device: str) -> None:
    cache = make_cache(device, torch.float16, config=EVERYTHING)
    q, (k, v) = queries(cache, 5), new_tokens(cache, 5)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    for layer_idx in (DENSE, SPARSE):
        assert not hata.prefill(q, k, v, cache, layer_idx).requires_grad
    for layer_idx in (DENSE, SPARSE):
        assert not hata.decode_attention(q, k, v, cache, layer_idx).requires_grad


@gpu_only
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("config", [FEW, EVERYTHING], ids=["few", "everything"])
def test_a_captured_step_replays_with_other_lengths(
    config: HataConfig, page_size: int | None
) -> None:
    shape = {"config": config, "page_size": page_size, "record_cuts": True}
    caches = [make_cache("cuda", torch.bfloat16, **shape) for _ in range(2)]
    for cache in caches:
        torch.manual_seed(1)
        fill(cache, 20, [20, 8, 1])
    replayed, eager = caches
    q, (k, v) = queries(eager, 1), new_tokens(eager, 1)

    def step(cache: HataCache) -> list[torch.Tensor]:
        return [hata.decode_attention(q, k, v, cache, layer_idx) for layer_idx in (DENSE, SPARSE)]

    for cache in caches:
        step(cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(replayed)
    for _ in range(20):
        for static, fresh in zip(
            (q, k, v), (queries(eager, 1), *new_tokens(eager, 1)), strict=True
        ):
            static.copy_(fresh)
        replayed.extend(1)
        graph.replay()
        for actual, expected in zip(captured, step(eager), strict=True):
            assert_equal(actual, expected)
        assert_equal(replayed.last_selection(SPARSE)[0], eager.last_selection(SPARSE)[0])
        for a, e in zip(replayed.last_cut(SPARSE), eager.last_cut(SPARSE), strict=True):
            assert_equal(a, e)
    for now, then in zip(contents(replayed), contents(eager), strict=True):
        assert_equal(now, then)
