import re
from typing import Any

import pytest
import torch

import hata
from attention_model import DENSE, FEW, SPARSE, fill, queries
from cache_model import WEIGHTS, assert_unchanged, contents, make_cache, new_tokens
from hata import HashWeights


def other_weights(**changes: int) -> HashWeights:
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "num_bits": 64, **changes}
    return HashWeights.random(**sizes)


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "cache": ({"cache": None}, "cache must be a HataCache, got NoneType"),
    "weights": ({"weights": None}, "weights must be HashWeights, got NoneType"),
    "weights of another model": (
        {"weights": other_weights(num_kv_heads=1)},
        "weights must have the shape of cache and config, [2, 2, 64, 64], got [2, 1, 64, 64]",
    ),
    "weights of other bits": (
        {"weights": other_weights(num_bits=128)},
        "weights must have the shape of cache and config, [2, 2, 64, 64], got [2, 2, 64, 128]",
    ),
    "layer": ({"layer_idx": 2}, "layer_idx must be in 0..1, got 2"),
    "q heads": (
        {"q": lambda q: q[:, :, :5]},
        "q must have a multiple of num_kv_heads=2 heads, got 5",
    ),
    "q tokens": ({"q": lambda q: q[:, :1]}, "q must have shape [batch=3, q_len=2, num_heads"),
    "q dtype": ({"q": lambda q: q.float()}, "q must be torch.float16, got torch.float32"),
    "q type": ({"q": 1}, "q must be a tensor, got int"),
    "k shape": ({"k": lambda k: k[..., :32]}, "k must have shape [batch=3, q_len, num_kv_heads=2"),
    "v shape": ({"v": lambda v: v[:, :, :1]}, "v must have shape [batch=3, q_len=2, num_kv_heads"),
    "k strides": ({"k": lambda k: k.mT.contiguous().mT}, "k must be contiguous in its last"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("layer_idx", [DENSE, SPARSE])
@pytest.mark.parametrize("function", [hata.prefill, hata.decode_attention])
def test_a_failed_call_says_why_and_changes_nothing(
    device: str, function: Any, layer_idx: int, failure: str
) -> None:
    cache = make_cache(device, torch.float16, config=FEW, page_size=16)
    fill(cache, 10, [10, 9, 8])
    before = contents(cache)
    changes, message = FAILURES[failure]
    arguments = {
        "q": queries(cache, 2),
        **dict(zip("kv", new_tokens(cache, 2), strict=True)),
        "cache": cache,
        "layer_idx": layer_idx,
        "weights": WEIGHTS,
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(message)):
        function(**arguments)
    assert_unchanged(cache, before, [10, 9, 8])


@pytest.mark.parametrize("function", [hata.prefill, hata.decode_attention])
def test_a_full_cache_stays_as_it_is(device: str, function: Any) -> None:
    cache = make_cache(device, torch.float16, config=FEW, page_size=16)
    fill(cache, 49)
    before = contents(cache)
    for layer_idx in (DENSE, SPARSE):
        with pytest.raises(ValueError, match="sequence lengths must be at most max_seq_len=50"):
            function(queries(cache, 2), *new_tokens(cache, 2), cache, layer_idx, WEIGHTS)
        assert_unchanged(cache, before, [49, 49, 49])
