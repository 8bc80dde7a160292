import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cache_model import (
    WEIGHTS,
    CacheModel,
    assert_unchanged,
    contents,
    make_cache,
    new_tokens,
)
from hata import HataCache


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
            **{name: make(k) if callable(make) else make for name, make in changes.items()},
        }
        cache.append(**arguments)

    return call


FAILURES = {
    "layer_idx": (bad_append(layer_idx=2), "append: layer_idx must be in 0..1, got 2"),
    "layer_idx type": (bad_append(layer_idx="0"), "append: layer_idx must be an int, got str"),
    "k rank": (
        bad_append((3, 4, 64)),
        "k must have shape [batch, q_len, num_kv_heads, head_dim], got [3, 4",
    ),
    "k batch": (bad_append((2, 4, 2, 64)), "head_dim=64], got [2, 4, 2, 64]"),
    "k heads": (bad_append((3, 4, 3, 64)), "head_dim=64], got [3, 4, 3, 64]"),
    "k dtype": (bad_append(k=lambda k: k.double()), "append: k must be"),
    "k type": (bad_append(k=[1.0]), "append: k must be a tensor, got list"),
    "v shape": (bad_append(v=lambda k: k[:, :3]), "append: v must have shape [batch=3, q_len=4"),
    "k strides": (bad_append(k=lambda k: k.mT.contiguous().mT), "cache_append: k must be contig"),
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
    "cut": (
        lambda cache: cache.last_cut(0),
        "last_cut: layer_idx must be a sparse layer that has decoded, got 0",
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": 64}, "config must be a HataConfig, got int"),
        ({"weights": None}, "weights must be HashWeights, got NoneType"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"max_seq_len": 0}, "max_seq_len must be in 1..1073741824, got 0"),
        ({"max_seq_len": "8K"}, "max_seq_len must be an int, got str"),
        ({"page_size": 12}, "page_size must be a power of two, got 12"),
        ({"page_size": 0}, "page_size must be in 1..1073741824, got 0"),
        ({"num_pages": 4}, "num_pages must be None without page_size, got 4"),
        ({"page_size": 16, "num_pages": 0}, "num_pages must be in 1..2147483647, got 0"),
        ({"dtype": torch.float64}, "dtype must be one of (torch.float16, torch.bfloat16"),
        (
            {"kv_cache_dtype": torch.bfloat16},
            "kv_cache_dtype must be None, torch.float16 or torch.float8_e4m3fn, got torch.bfloat16",
        ),
        (
            {"dtype": torch.float32, "device": "meta"},
            "dtype must be one of (torch.float16, torch.bfloat16) on meta, got torch.float32",
        ),
    ],
)
def test_rejects_arguments(device: str, changes: dict[str, Any], message: str) -> None:
    arguments = {
        "weights": WEIGHTS,
        "batch": 1,
        "max_seq_len": 16,
        "dtype": torch.float16,
        "device": device,
        **changes,
    }
    with pytest.raises((ValueError, TypeError), match=re.escape(f"hata.HataCache: {message}")):
        HataCache(**arguments)
