import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cache_model import (
    CacheModel,
    assert_unchanged,
    contents,
    layer_weights,
    make_cache,
    new_tokens,
)
from closeness import assert_equal
from hata import HataCache, HataConfig

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
        cache.append(layer_idx, k, v, layer_weights(cache, layer_idx), new_seqlens=[0, 0, 0])
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
        cache.append(layer_idx, k, v, layer_weights(cache, layer_idx))
        assert cache.seq_lens == [2, 2, 2]
        assert_equal(cache.keys_values(layer_idx)[0], k)
    cache.append(0, k, v, layer_weights(cache, 0))
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


def bad_append(
    k_shape: tuple[int, ...] | None = None, **changes: Any
) -> Callable[[HataCache], None]:
    """An append of 4 tokens to layer 0 with one thing changed."""

    def call(cache: HataCache) -> None:
        k, v = new_tokens(cache, 4)
        if k_shape is not None:
            k = v = torch.zeros(k_shape, dtype=cache.dtype, device=cache.device)
        arguments = {
            "layer_idx": 0,
            "k": k,
            "v": v,
            "key_weights": layer_weights(cache, 0),
            **{name: make(k) if callable(make) else make for name, make in changes.items()},
        }
        cache.append(**arguments)

    return call


FAILURES = {
    "layer_idx": (bad_append(layer_idx=2), "append: layer_idx must be in 0..1, got 2"),
    "layer_idx type": (bad_append(layer_idx="0"), "append: layer_idx must be an int, got str"),
    "k rank": (bad_append((3, 4, 64)), "append: k must have shape [batch=3, q_len, num_kv_heads=2"),
    "k batch": (bad_append((2, 4, 2, 64)), "head_dim=64], got [2, 4, 2, 64]"),
    "k heads": (bad_append((3, 4, 3, 64)), "head_dim=64], got [3, 4, 3, 64]"),
    "k dtype": (bad_append(k=lambda k: k.double()), "append: k must be torch.float16, got"),
    "k type": (bad_append(k=[1.0]), "append: k must be a tensor, got list"),
    "v shape": (bad_append(v=lambda k: k[:, :3]), "append: v must have shape [batch=3, q_len=4"),
    "v device": (bad_append(v=lambda k: k.to("meta")), "append: v must be on"),
    "k strides": (bad_append(k=lambda k: k.mT.contiguous().mT), "cache_append: k must be contig"),
    "weights shape": (bad_append(key_weights=lambda k: k[0]), "cache_append: key_weights must"),
    "weights dtype": (
        bad_append(key_weights=lambda k: torch.zeros(2, 64, 64, device=k.device)),
        "cache_append: key_weights must",
    ),
    "new count": (bad_append(new_seqlens=[4, 4]), "new_seqlens must have batch=3 entries, got 2"),
    "new range": (bad_append(new_seqlens=[4, 5, 4]), "new_seqlens must be in 0..4, got 5"),
    "new negative": (bad_append(new_seqlens=[4, -1, 4]), "new_seqlens must be in 0..4, got -1"),
    "new type": (bad_append(new_seqlens=[4, 1.0, 4]), "new_seqlens must be an int, got float"),
    "new no list": (bad_append(new_seqlens={4}), "new_seqlens must be ints, one for each"),
    "too long": (
        bad_append((3, 31, 2, 64)),
        "append: sequence lengths must be at most max_seq_len=50, got [51, 51, 43]",
    ),
    "no page left": (
        bad_append((3, 20, 2, 64)),
        "append: sequence lengths must fit into 7 pages of 16 positions, got [40, 40, 32], which",
    ),
    "extend type": (lambda cache: cache.extend(1.5), "extend: new must be ints, one for each"),
    "extend bool": (lambda cache: cache.extend(True), "extend: new must be an int, got bool"),
    "extend negative": (lambda cache: cache.extend(-1), "extend: new must be in 0..50, got -1"),
    "extend count": (lambda cache: cache.extend([1]), "extend: new must have batch=3 entries"),
    "extend far": (lambda cache: cache.extend(31), "extend: sequence lengths must be at most"),
    "extend pages": (lambda cache: cache.extend(28), "extend: sequence lengths must fit into"),
    "truncate longer": (
        lambda cache: cache.truncate([20, 21, 12]),
        "truncate: lengths must be at most the present ones, [20, 20, 12], got [20, 21, 12]",
    ),
    "truncate negative": (lambda cache: cache.truncate(-1), "lengths must be in 0..50, got -1"),
    "truncate count": (lambda cache: cache.truncate([1]), "lengths must have batch=3 entries"),
    "reorder range": (lambda cache: cache.reorder([0, 1, 3]), "batch_idx must be in 0..2, got 3"),
    "reorder count": (lambda cache: cache.reorder([0]), "batch_idx must have batch=3 entries"),
    "reorder type": (lambda cache: cache.reorder([0.0, 1.0, 2.0]), "batch_idx must be an int"),
    "layer": (lambda cache: cache.keys_values(2), "keys_values: layer_idx must be in 0..1, got 2"),
    "sequence": (lambda cache: cache.keys_values(0, 3), "batch_idx must be in 0..2, got 3"),
    "lengths": (
        lambda cache: cache.keys_values(0),
        "batch_idx must name a sequence where lengths differ, got [20, 20, 12]",
    ),
    "selection": (
        lambda cache: cache.last_selection(0),
        "last_selection: layer_idx must be a sparse layer that has decoded, got 0",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_call_says_why_and_changes_nothing(device: str, failure: str) -> None:
    cache = make_cache(device, torch.float16, page_size=16, num_pages=7)
    model = CacheModel(cache)
    model.append(20, [20, 20, 12])
    before = contents(cache)
    call, message = FAILURES[failure]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(message)):
        call(cache)
    assert_unchanged(cache, before, [20, 20, 12])
    model.append(1)  # no page is lost, and no step is left open
    model.truncate([0, 0, 0])
    model.append(40, [40, 40, 16])
    model.check()


def test_reorder_without_pages_for_the_copies_changes_nothing(device: str) -> None:
    cache = make_cache(device, torch.float16, page_size=16, num_pages=4)
    model = CacheModel(cache)
    model.append(31, [31, 1, 1])
    before = contents(cache)
    with pytest.raises(ValueError, match="batch_idx must need at most 4 pages of 16 positions"):
        cache.reorder([0, 0, 0])
    assert_unchanged(cache, before, [31, 1, 1])
    model.reorder([1, 0, 1])
    model.append(1)
    model.check()


def test_layers_must_keep_step(device: str) -> None:
    cache = make_cache(device, torch.float16, page_size=16)
    k, v = new_tokens(cache, 3)
    cache.append(0, k, v, layer_weights(cache, 0))
    before = contents(cache)
    behind = (
        r"layers must all hold the tokens of the last step .*, got none of them in layers \[1\]"
    )
    for call in (
        lambda: cache.append(0, k, v, layer_weights(cache, 0)),
        lambda: cache.extend(1),
        lambda: cache.truncate(1),
        lambda: cache.reorder([0, 1, 2]),
    ):
        with pytest.raises(ValueError, match=behind):
            call()
    with pytest.raises(
        ValueError, match=r"layer 1 must bring .* step, \[3, 3, 3\], got \[2, 2, 2\]"
    ):
        cache.append(1, k[:, :2], v[:, :2], layer_weights(cache, 1))
    assert_unchanged(cache, before, [3, 3, 3])
    cache.append(1, k, v, layer_weights(cache, 1))
    cache.extend(1)
    assert cache.seq_lens == [4, 4, 4]
    cache.reset()
    assert cache.seq_lens == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": 64}, "config must be a HataConfig, got int"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"head_dim": 257}, "head_dim must be in 1..256, got 257"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"max_seq_len": 0}, "max_seq_len must be in 1..1073741824, got 0"),
        ({"max_seq_len": "8K"}, "max_seq_len must be an int, got str"),
        ({"page_size": 12}, "page_size must be a power of two, got 12"),
        ({"page_size": 0}, "page_size must be in 1..1073741824, got 0"),
        ({"num_pages": 4}, "num_pages must be None without page_size, got 4"),
        ({"page_size": 16, "num_pages": 0}, "num_pages must be in 1..2147483647, got 0"),
        ({"dtype": torch.float64}, "dtype must be float16, bfloat16 or float32, got torch.float64"),
    ],
)
def test_rejects_arguments(device: str, changes: dict[str, Any], message: str) -> None:
    arguments = {
        "config": HataConfig(),
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 64,
        "batch": 1,
        "max_seq_len": 16,
        "dtype": torch.float16,
        "device": device,
        **changes,
    }
    with pytest.raises((ValueError, TypeError), match=re.escape(f"hata.HataCache: {message}")):
        HataCache(**arguments)
