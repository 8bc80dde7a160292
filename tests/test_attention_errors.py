from typing import Any

import pytest
import torch

import hata
from attention_model import DENSE, FEW, SPARSE, fill, queries
from cache_model import assert_unchanged, contents, make_cache, new_tokens

FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "cache": ({"cache": None}, "cache must be a HataCache, got NoneType"),
    "layer": ({"layer_idx": 2}, r"layer_idx must be in 0\.\.1, got 2"),
    "q heads": (
        {"q": lambda q: q[:, :, :5]},
        "must (have|be) a multiple of num_kv_heads=2( heads)?, got 5",
    ),
    "q tokens": (
        {"q": lambda q: q[:, :1]},
        r"must have shape \[batch=3, q_len=[12], num_(kv_)?heads",
    ),
    "q dtype": (
        {"q": lambda q: q.float()},
        "q must be (torch.float16, got torch.float32|Half, got Float)",
    ),
    "q type": ({"q": 1}, "q must be a tensor, got int"),
    "k shape": (
        {"k": lambda k: k[..., :32]},
        r"k must have shape \[batch=3, q_len(=2)?, num_kv_heads=2",
    ),
    "v shape": (
        {"v": lambda v: v[:, :, :1]},
        r"v must have shape \[batch=3, q_len=2, num_kv_heads",
    ),
    "softcap": ({"softcap": 0.0}, r"softcap must be above 0, got 0\.0"),
    "softcap type": ({"softcap": "30"}, "softcap must be a number, got str"),
    "sink shape": (
        {"sink_logits": torch.zeros(2)},
        r"sink_logits must have shape \[num_heads=6\], got \[2\]",
    ),
    "sink dtype": (
        {"sink_logits": torch.zeros(6, dtype=torch.int32)},
        "sink_logits must be of a floating dtype, got torch.int32",
    ),
    "sink device": (
        {"sink_logits": torch.zeros(6, device="meta")},
        "sink_logits must be on (cpu|cuda:0), got meta",
    ),
    "sink type": ({"sink_logits": [0.0]}, "sink_logits must be a tensor, got list"),
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
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        function(**arguments)
    assert_unchanged(cache, before, [10, 9, 8])


@pytest.mark.parametrize("function", [hata.prefill, hata.decode_attention])
def test_a_full_cache_stays_as_it_is(device: str, function: Any) -> None:
    cache = make_cache(device, torch.float16, config=FEW, page_size=16)
    fill(cache, 49)
    before = contents(cache)
    for layer_idx in (DENSE, SPARSE):
        with pytest.raises(ValueError, match="sequence lengths must be at most max_seq_len=50"):
            function(queries(cache, 2), *new_tokens(cache, 2), cache, layer_idx)
        assert_unchanged(cache, before, [49, 49, 49])
