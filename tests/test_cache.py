import random

import pytest
import torch

from cache_model import (
    CacheModel,
    assert_unchanged,
    contents,
    make_cache,
    new_tokens,
)
from closeness import assert_equal

PAGE_SIZES = [None, 1, 16]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_holds_what_was_appended(device: str, dtype: torch.dtype, page_size: int | None) -> None:
    model = CacheModel(make_cache(device, dtype, page_size=page_size))
    model.check()
    model.append(37)
    model.check()
    model.append(1)
    model.append(12)  # up to max_seq_len
    model.check()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_ragged_batches_are_left_padded(device: str, page_size: int | None) -> None:
    model = CacheModel(make_cache(device, torch.float16, page_size=page_size))
    model.append(20, [20, 3, 0])
    model.check()
    model.append(5, [0, 5, 1])
    model.append(1)
    assert model.cache.seq_lens == [21, 9, 2]
    model.check()


def test_padding_leaves_what_lies_before_it_alone(device: str) -> None:
    cache = make_cache(device, torch.float16)
    model = CacheModel(cache)
    model.append(10)
    before = [k.clone() for k, _ in (cache.keys_values(layer_idx) for layer_idx in (0, 1))]
    k, v = (torch.full_like(t, torch.nan) for t in new_tokens(cache, 6))
    for layer_idx in (0, 1):
        cache.append(layer_idx, k, v, new_seqlens=[0, 0, 0])
        assert_equal(cache.keys_values(layer_idx)[0], before[layer_idx])


@pytest.mark.parametrize(("page_size", "num_pages"), [(None, None), (1, None), (4, 40), (16, None)])
@pytest.mark.parametrize("seed", range(2))
def test_any_sequence_of_calls_keeps_every_token(
    device: str, page_size: int | None, num_pages: int | None, seed: int
) -> None:
    cache = make_cache(device, torch.float16, page_size=page_size, num_pages=num_pages)
    model = CacheModel(cache)
    draw = random.Random(seed)
    for _ in range(30):
        lengths = model.lengths
        room = cache.max_seq_len - max(lengths)
        q_len = draw.randint(0, min(room, 12))
        call = draw.choice(["append", "ragged", "truncate", "reorder", "reset"])
        if call == "append":
            model.append(q_len)
        elif call == "ragged":
            model.append(q_len, [draw.randint(0, q_len) for _ in lengths])
        elif call == "truncate":
            model.truncate([draw.randint(0, n) for n in lengths])
        elif call == "reorder":
            model.reorder([draw.randrange(cache.batch) for _ in lengths])
        elif draw.random() < 0.2:
            model.reset()
        model.check()


def test_sequences_that_continue_the_same_one_do_not_share_pages(device: str) -> None:
    model = CacheModel(make_cache(device, torch.float16, page_size=16))
    model.append(20)
    model.reorder([1, 1, 1])
    model.append(1)
    model.check()


def test_pages_are_handed_out_on_demand_and_come_back(device: str) -> None:
    cache = make_cache(device, torch.float16, page_size=4, num_pages=6)
    model = CacheModel(cache)

    def held() -> int:
        return int((cache.block_table >= 0).sum())

    assert held() == 0
    model.append(4)
    assert held() == 3
    model.append(1)
    assert held() == 6
    model.truncate([5, 4, 0])
    assert held() == 3
    model.append(8, [8, 0, 4])
    assert held() == 6
    model.check()
    model.reset()
    assert held() == 0
    model.append(8)
    model.check()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_buffers_keep_their_addresses(device: str, page_size: int | None) -> None:
    cache = make_cache(device, torch.float16, page_size=page_size)
    buffers = (cache.block_table, cache.cache_seqlens, *cache.k_cache, *cache.code_cache)
    addresses = [t.data_ptr() for t in buffers]
    model = CacheModel(cache)
    model.append(7)
    model.reorder([2, 0, 0])
    model.truncate([3, 3, 7])
    model.append(9, [9, 1, 0])
    model.reset()
    now = (cache.block_table, cache.cache_seqlens, *cache.k_cache, *cache.code_cache)
    assert [t.data_ptr() for t in now] == addresses


def test_extend_opens_a_step_that_every_layer_fills_once(device: str) -> None:
    cache = make_cache(device, torch.float16, page_size=16)
    cache.extend([2, 2, 2])
    assert cache.seq_lens == cache.cache_seqlens.tolist() == [2, 2, 2]
    k, v = new_tokens(cache, 2)
    for layer_idx in (1, 0):
        cache.append(layer_idx, k, v)
        assert cache.seq_lens == [2, 2, 2]
        assert_equal(cache.keys_values(layer_idx)[0], k)
    cache.append(0, k, v)
    assert cache.seq_lens == [4, 4, 4]


def test_extend_can_follow_extend_as_for_replayed_graphs(device: str) -> None:
    cache = make_cache(device, torch.float16, page_size=1)
    cache.extend(3)
    cache.extend([1, 0, 2])
    assert cache.seq_lens == cache.cache_seqlens.tolist() == [4, 3, 5]
    assert (cache.block_table >= 0).sum(1).tolist() == [4, 3, 5]


def test_lengths_may_come_as_tensors(device: str) -> None:
    cache = make_cache(device, torch.float16)
    cache.extend(torch.tensor([4, 2, 3], device=device))
    cache.truncate(torch.tensor([3, 2, 1]))
    cache.reorder(torch.tensor([2, 1, 0], device=device))
    assert cache.seq_lens == cache.cache_seqlens.tolist() == [1, 2, 3]


def test_layers_must_keep_step(device: str) -> None:
    cache = make_cache(device, torch.float16, page_size=16)
    k, v = new_tokens(cache, 3)
    cache.append(0, k, v)
    before = contents(cache)
    behind = (
        r"layers must all hold the tokens of the last step .*, got none of them in layers \[1\]"
    )
    for call in (
        lambda: cache.append(0, k, v),
        lambda: cache.extend(1),
        lambda: cache.truncate(1),
        lambda: cache.reorder([0, 1, 2]),
    ):
        with pytest.raises(ValueError, match=behind):
            call()
    with pytest.raises(
        ValueError, match=r"layer 1 must bring .* step, \[3, 3, 3\], got \[2, 2, 2\]"
    ):
        cache.append(1, k[:, :2], v[:, :2])
    assert_unchanged(cache, before, [3, 3, 3])
    cache.append(1, k, v)
    cache.extend(1)
    assert cache.seq_lens == [4, 4, 4]
    cache.reset()
    assert cache.seq_lens == [0, 0, 0]
