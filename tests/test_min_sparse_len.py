"""Sequences shorter than `HataConfig.min_sparse_len` are decoded densely, each on its own."""

import re
from dataclasses import replace

import pytest
import torch

import hata
from attention_model import DENSE, FEW, SPARSE, assert_attends, fill, queries
from cache_model import WEIGHTS, WITH_NORMS, contents, make_cache, new_tokens
from closeness import assert_equal
from devices import gpu_only
from hata import HataCache, HataConfig


def routed(min_sparse_len: int) -> HataConfig:
    return replace(FEW, min_sparse_len=min_sparse_len)


def visible(cache: HataCache, batch_idx: int, q_len: int) -> torch.Tensor:
    return torch.arange(cache.seq_lens[batch_idx] - q_len + 1, cache.seq_lens[batch_idx] + 1)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("lengths", [[30, 30, 30], [30, 12, 1]], ids=["equal", "ragged"])
@pytest.mark.parametrize("q_len", [1, 3])
def test_short_sequences_get_dense_attention(
    device: str, dtype: torch.dtype, q_len: int, lengths: list[int], page_size: int | None
) -> None:
    cache = make_cache(device, dtype, config=routed(30 + q_len + 1), page_size=page_size)
    fill(cache, 30, lengths)
    q, (k, v) = queries(cache, q_len), new_tokens(cache, q_len)
    for layer_idx in (DENSE, SPARSE):
        out = hata.decode_attention(q, k, v, cache, layer_idx)
        assert_attends(out, q, cache, layer_idx)
    assert cache.seq_lens == [length + q_len for length in lengths]


@pytest.mark.parametrize("q_len", [1, 3])
def test_a_sequence_is_routed_by_its_own_length(
    device: str, dtype: torch.dtype, q_len: int
) -> None:
    """Sequence 0 is long, 1 just long enough, 2 one short of it."""
    cache = make_cache(device, dtype, config=routed(20 + q_len))
    sparse = make_cache(device, dtype, config=FEW)
    for each in (cache, sparse):
        torch.manual_seed(1)
        fill(each, 40, [40, 20, 19])
        q, (k, v) = queries(each, q_len), new_tokens(each, q_len)
        for layer_idx in (DENSE, SPARSE):
            out = hata.decode_attention(q, k, v, each, layer_idx)
        if each is cache:
            routed_out = out
    indices, num_selected = cache.last_selection(SPARSE)
    sparse_indices, sparse_selected = sparse.last_selection(SPARSE)
    assert_equal(routed_out[:2], out[:2])
    assert_equal(num_selected[:2], sparse_selected[:2])
    assert_equal(indices[:2, ..., : FEW.top_k], sparse_indices[:2])
    assert (indices[:2, ..., FEW.top_k :] == -1).all()
    assert_attends(routed_out, q, cache, SPARSE, indices)
    assert (num_selected[2].cpu() == visible(cache, 2, q_len)[:, None]).all()
    for now, then in zip(contents(cache), contents(sparse), strict=True):
        assert_equal(now, then)  # dense steps hash their keys too


def test_the_selection_of_a_dense_step_is_every_visible_position(device: str) -> None:
    cache = make_cache(device, torch.float16, config=routed(25))
    fill(cache, 20, [20, 5, 0])
    q, (k, v) = queries(cache, 2), new_tokens(cache, 2)
    for layer_idx in (DENSE, SPARSE):
        hata.decode_attention(q, k, v, cache, layer_idx)
    indices, num_selected = cache.last_selection(SPARSE)
    assert indices.shape == (3, 2, 2, 22)
    for b, seq_len in enumerate(cache.seq_lens):
        for j in range(2):
            count = seq_len - 1 + j
            assert (num_selected[b, j] == count).all()
            assert (indices[b, j, :, :count].cpu() == torch.arange(count)).all()
            assert (indices[b, j, :, count:] == -1).all()
    mass = hata.attention_mass(q, cache, SPARSE, indices)
    torch.testing.assert_close(mass, torch.ones_like(mass))


@pytest.mark.parametrize("weights", [WEIGHTS, WITH_NORMS], ids=["plain", "norms"])
def test_a_dense_step_cuts_nothing(device: str, weights: hata.HashWeights) -> None:
    cache = make_cache(device, torch.float16, config=routed(25), weights=weights, record_cuts=True)
    fill(cache, 24, [24, 23, 0])  # the first one turns sparse
    q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
    for layer_idx in (DENSE, SPARSE):
        hata.decode_attention(q, k, v, cache, layer_idx)
    last_score, num_ties = cache.last_cut(SPARSE)
    assert last_score.dtype == weights.score_dtype
    lowest = -torch.inf if weights.key_norms else -(2**31)
    assert (last_score[0] > lowest).all()
    assert (num_ties[0] > 0).all()
    assert (last_score[1:] == lowest).all()
    assert (num_ties[1:] == 0).all()


def test_cuts_are_recorded_on_request_alone(device: str) -> None:
    cache = make_cache(device, torch.float16, config=FEW)
    for layer_idx in (DENSE, SPARSE):
        hata.decode_attention(queries(cache, 1), *new_tokens(cache, 1), cache, layer_idx)
    message = "hata.HataCache.last_cut: record_cuts must be True for this cache, got False"
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.last_cut(SPARSE)


def test_a_growing_sequence_turns_sparse(device: str) -> None:
    cache = make_cache(device, torch.float16, config=routed(23))
    fill(cache, 20)
    counts = []
    for _ in range(4):
        q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
        for layer_idx in (DENSE, SPARSE):
            hata.decode_attention(q, k, v, cache, layer_idx)
        counts.append(cache.last_selection(SPARSE)[1].flatten().tolist())
    assert counts == [[21] * 6, [22] * 6, [FEW.top_k] * 6, [FEW.top_k] * 6]


def test_a_failed_dense_step_changes_nothing(device: str) -> None:
    cache = make_cache(device, torch.float16, config=routed(1000))
    fill(cache, 10)
    before = [t.clone() for t in contents(cache)]
    q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
    with pytest.raises(RuntimeError, match="k must be contiguous in its last"):
        hata.decode_attention(q, k.mT.contiguous().mT, v, cache, SPARSE)
    assert cache.seq_lens == [10, 10, 10]
    for now, then in zip(contents(cache), before, strict=True):
        assert_equal(now, then)


def test_a_cache_resolves_the_default_for_its_shape_and_device(device: str) -> None:
    measured = make_cache(device, torch.float16, config=replace(FEW, min_sparse_len=None))
    assert measured.min_sparse_len == {"cpu": 0, "cuda": 10923}[device]  # 65536 / (3 * 2), up
    assert make_cache(device, torch.float16, config=routed(7)).min_sparse_len == 7


@gpu_only
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("warm_up", [30, 10], ids=["sparse", "dense"])
def test_a_captured_step_serves_every_length(warm_up: int, page_size: int | None) -> None:
    """One graph of both layers, for long and short sequences, and as they become long."""
    config = routed(25)
    replayed, eager = (
        make_cache("cuda", torch.bfloat16, config=config, page_size=page_size) for _ in range(2)
    )
    q, (k, v) = queries(eager, 1), new_tokens(eager, 1)

    def step(cache: HataCache) -> list[torch.Tensor]:
        return [hata.decode_attention(q, k, v, cache, layer_idx) for layer_idx in (DENSE, SPARSE)]

    fill(replayed, warm_up)
    step(replayed)
    graph = torch.cuda.CUDAGraph()
    replayed.extend(1)
    with torch.cuda.graph(graph):
        captured = step(replayed)
    for cache in (replayed, eager):
        cache.reset()
        torch.manual_seed(1)
        fill(cache, 40, [40, 20, 3])
    for _ in range(8):
        for static, fresh in zip(
            (q, k, v), (queries(eager, 1), *new_tokens(eager, 1)), strict=True
        ):
            static.copy_(fresh)
        replayed.extend(1)
        graph.replay()
        for actual, expected in zip(captured, step(eager), strict=True):
            assert_equal(actual, expected)
        for actual, expected in zip(
            replayed.last_selection(SPARSE), eager.last_selection(SPARSE), strict=True
        ):
            assert_equal(actual, expected)
        assert_attends(captured[0], q, replayed, DENSE)
        assert_attends(captured[1], q, replayed, SPARSE, replayed.last_selection(SPARSE)[0])
    for layer_idx in (DENSE, SPARSE):
        for b in range(eager.batch):  # behind their ends lies what the warm-up has left
            pairs = zip(
                replayed.keys_values(layer_idx, b), eager.keys_values(layer_idx, b), strict=True
            )
            for now, then in pairs:
                assert_equal(now, then)
