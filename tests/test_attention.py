import re
from typing import Any

import pytest
import torch
from torch import Tensor

import hata
from cache_model import (
    HEAD_DIM,
    NUM_KV_HEADS,
    WEIGHTS,
    assert_unchanged,
    contents,
    make_cache,
    new_tokens,
)
from closeness import assert_equal, assert_no_worse_than_pytorch
from hata import HashWeights, HataCache, HataConfig, reference

DENSE, SPARSE = 0, 1  # the layers of every cache here
EVERYTHING = HataConfig(top_k=64, num_dense_layers=1)
FEW = HataConfig(top_k=9, num_sink=2, num_recent=3, num_dense_layers=1)
PAGE_SIZES = [None, 1, 16]
GROUPS = [1, 3, 4]


def queries(cache: HataCache, q_len: int, group: int = 3) -> Tensor:
    shape = (cache.batch, q_len, NUM_KV_HEADS * group, HEAD_DIM)
    return torch.randn(shape).to(cache.device, cache.dtype)


def all_positions(cache: HataCache, q_len: int) -> Tensor:
    shape = (cache.batch, q_len, NUM_KV_HEADS, max(cache.seq_lens))
    positions = torch.arange(shape[-1], dtype=torch.int32, device=cache.device)
    return positions.expand(shape).contiguous()


def attention(
    q: Tensor, cache: HataCache, layer_idx: int, indices: Tensor | None, softmax_scale: float
) -> Tensor:
    """Attention over what the cache holds, or the rows that indices name, in the dtype of q."""
    out = torch.zeros_like(q)
    q_len, group = q.shape[1], q.shape[2] // NUM_KV_HEADS
    for b, seq_len in enumerate(cache.seq_lens):
        k, v = (t[0].to(q.dtype).transpose(0, 1) for t in cache.keys_values(layer_idx, b))
        last = torch.arange(seq_len - q_len, seq_len, device=q.device)
        mask = (torch.arange(seq_len, device=q.device) <= last[:, None]).expand(
            NUM_KV_HEADS, -1, -1
        )
        if indices is not None:
            chosen = torch.zeros(NUM_KV_HEADS, q_len, seq_len + 1, device=q.device)
            rows = indices[b].transpose(0, 1).long()
            chosen.scatter_(2, torch.where(rows < 0, seq_len, rows), 1.0)
            mask = mask & (chosen[..., :seq_len] > 0)
        for i in range(q.shape[2]):
            h = i // group
            logits = (q[b, :, i] @ k[h].T).to(torch.promote_types(q.dtype, torch.float32))
            shares = logits.mul(softmax_scale).masked_fill(~mask[h], -torch.inf).softmax(-1)
            out[b, :, i] = shares.to(q.dtype) @ v[h]
    return out


def assert_attends(
    out: Tensor,
    q: Tensor,
    cache: HataCache,
    layer_idx: int,
    indices: Tensor | None = None,
    softmax_scale: float = HEAD_DIM**-0.5,
) -> None:
    """``out`` is the attention over what the cache holds now; without indices, over all of it."""
    plain = attention(q, cache, layer_idx, indices, softmax_scale)
    truth = attention(q.double(), cache, layer_idx, indices, softmax_scale)
    assert_no_worse_than_pytorch(out, plain, truth)


def fill(cache: HataCache, q_len: int, new_seqlens: list[int] | None = None) -> None:
    """Gives every layer the same random prompt."""
    q, (k, v) = queries(cache, q_len), new_tokens(cache, q_len)
    for layer_idx in (DENSE, SPARSE):
        hata.prefill(q, k, v, cache, layer_idx, WEIGHTS, new_seqlens=new_seqlens)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group", GROUPS)
def test_prefill_is_causal_attention_in_any_chunks(
    device: str, dtype: torch.dtype, group: int, page_size: int | None
) -> None:
    cache = make_cache(device, dtype, config=EVERYTHING, page_size=page_size)
    for q_len in (17, 1, 20):
        q, (k, v) = queries(cache, q_len, group), new_tokens(cache, q_len)
        for layer_idx in (DENSE, SPARSE):
            out = hata.prefill(q, k, v, cache, layer_idx, WEIGHTS)
            assert_attends(out, q, cache, layer_idx)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_prefill_of_a_ragged_batch(device: str, dtype: torch.dtype, page_size: int | None) -> None:
    cache = make_cache(device, dtype, config=EVERYTHING, page_size=page_size)
    for new in ([20, 7, 0], [0, 9, 9], [3, 1, 9]):
        q, (k, v) = queries(cache, max(new)), new_tokens(cache, max(new))
        padding = torch.arange(max(new)) < max(new) - torch.tensor(new)[:, None]
        for t in (q, k, v):
            t[padding.to(device)] = torch.nan
        out = hata.prefill(q, k, v, cache, DENSE, WEIGHTS, new_seqlens=new)
        hata.prefill(q, k, v, cache, SPARSE, WEIGHTS, new_seqlens=new)
        assert (out[padding.to(device)] == 0).all()
        for b, count in enumerate(new):
            if count > 0:
                kept = slice(max(new) - count, None)
                alone = single(cache, b)
                assert_attends(out[b : b + 1, kept], q[b : b + 1, kept], alone, DENSE)


def single(cache: HataCache, batch_idx: int) -> HataCache:
    """A cache that holds one sequence of another."""
    alone = make_cache(str(cache.device), cache.dtype, batch=1, config=cache.config)
    alone.extend(cache.seq_lens[batch_idx])
    for layer_idx in (DENSE, SPARSE):
        k, v = cache.keys_values(layer_idx, batch_idx)
        key_weights, _ = WEIGHTS.layer(layer_idx, cache.dtype, cache.device)
        alone.append(layer_idx, k, v, key_weights)
    return alone


def test_what_a_sequence_left_behind_does_not_leak(device: str) -> None:
    cache = make_cache(device, torch.float16, config=EVERYTHING)
    k, v = (torch.full_like(t, torch.nan) for t in new_tokens(cache, 40))
    for layer_idx in (DENSE, SPARSE):
        hata.prefill(queries(cache, 40), k, v, cache, layer_idx, WEIGHTS)
    cache.reset()
    fill(cache, 12, [12, 5, 1])
    q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
    for layer_idx in (DENSE, SPARSE):
        out = hata.decode_attention(q, k, v, cache, layer_idx, WEIGHTS)
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
            out = hata.decode_attention(q, k, v, cache, layer_idx, WEIGHTS)
            assert_attends(out, q, cache, layer_idx)
    assert cache.seq_lens == [30 + 3 * q_len, 8 + 3 * q_len, 1 + 3 * q_len]


@pytest.mark.parametrize(
    "config",
    [
        FEW,
        HataConfig(query_bits=1, key_norms=True, top_k=9, num_dense_layers=0, num_recent=1),
        HataConfig(query_bits=2, top_k=1, num_sink=0, num_recent=1, num_dense_layers=1),
    ],
    ids=["asymmetric", "paper", "one"],
)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("q_len", [1, 3])
def test_decoding_attends_to_the_reference_selection(
    device: str, dtype: torch.dtype, q_len: int, page_size: int | None, config: HataConfig
) -> None:
    cache = make_cache(device, dtype, config=config, page_size=page_size)
    fill(cache, 40, [40, 11, 2])
    q, (k, v) = queries(cache, q_len), new_tokens(cache, q_len)
    for layer_idx in (DENSE, SPARSE):
        out = hata.decode_attention(q, k, v, cache, layer_idx, WEIGHTS)
    indices, num_selected = cache.last_selection(SPARSE)
    _, query_weights = WEIGHTS.layer(SPARSE, dtype, cache.device)
    expected = reference.score_select(
        hata.encode_query(q, query_weights, config.query_bits),
        cache.code_cache[SPARSE],
        cache.block_table,
        cache.cache_seqlens,
        config.top_k,
        weight_sum=hata.plane_weight_sum(config.query_bits, 3),
        num_sink=config.num_sink,
        num_recent=config.num_recent,
        norm_cache=cache.norm_cache[SPARSE],
    )
    assert_equal(indices, expected[0].to(device))
    assert_equal(num_selected, expected[1].to(device))
    assert_attends(out, q, cache, SPARSE, indices)


def test_untied_query_weights_are_used(device: str) -> None:
    cache = make_cache(device, torch.float16, config=FEW)
    fill(cache, 40)
    random = HashWeights.random(num_layers=2, num_kv_heads=2, head_dim=64, num_bits=64, seed=1)
    untied = HashWeights(WEIGHTS.key_weights, random.key_weights)
    q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
    selections = []
    for weights in (WEIGHTS, untied):
        for layer_idx in (DENSE, SPARSE):
            hata.decode_attention(q, k, v, cache, layer_idx, weights)
        selections.append(cache.last_selection(SPARSE)[0].clone())
        cache.truncate(40)
    assert not torch.equal(*selections)


def test_the_scale_of_the_softmax_is_passed_on(device: str) -> None:
    cache = make_cache(device, torch.float16, config=EVERYTHING)
    fill(cache, 20)
    q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
    for layer_idx in (DENSE, SPARSE):
        out = hata.decode_attention(q, k, v, cache, layer_idx, WEIGHTS, softmax_scale=0.5)
        assert_attends(out, q, cache, layer_idx, softmax_scale=0.5)


def test_gradients_are_not_recorded(device: str) -> None:
    cache = make_cache(device, torch.float16, config=EVERYTHING)
    q, (k, v) = queries(cache, 5), new_tokens(cache, 5)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    for layer_idx in (DENSE, SPARSE):
        assert not hata.prefill(q, k, v, cache, layer_idx, WEIGHTS).requires_grad
    for layer_idx in (DENSE, SPARSE):
        assert not hata.decode_attention(q, k, v, cache, layer_idx, WEIGHTS).requires_grad


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("q_len", [1, 3])
def test_attention_mass_is_the_selected_share(device: str, q_len: int, page_size: int) -> None:
    cache = make_cache(device, torch.float16, config=FEW, page_size=page_size)
    fill(cache, 40, [40, 11, 1])
    q, (k, v) = queries(cache, q_len), new_tokens(cache, q_len)
    for layer_idx in (DENSE, SPARSE):
        hata.decode_attention(q, k, v, cache, layer_idx, WEIGHTS)
    indices, _ = cache.last_selection(SPARSE)
    mass = hata.attention_mass(q, cache, SPARSE, indices)
    assert mass.shape == q.shape[:3]
    assert mass.dtype == torch.float32
    everything = all_positions(cache, q_len)
    kv = (cache.k_cache[SPARSE].double(), cache.v_cache[SPARSE].double())
    place = (cache.block_table, cache.cache_seqlens)
    _, lse = reference.gather_attention(q.double(), *kv, *place, indices)
    _, dense_lse = reference.gather_attention(q.double(), *kv, *place, everything)
    # float32 softmax over at most 43 positions: a few roundings of numbers below 1
    torch.testing.assert_close(mass.double(), (lse - dense_lse).exp().double(), rtol=0, atol=1e-5)
    whole = hata.attention_mass(q, cache, SPARSE, everything)
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-5)
    none = torch.full_like(indices, -1)
    assert (hata.attention_mass(q, cache, SPARSE, none) == 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("config", [FEW, EVERYTHING], ids=["few", "everything"])
def test_a_captured_step_replays_with_other_lengths(
    config: HataConfig, page_size: int | None
) -> None:
    caches = [
        make_cache("cuda", torch.bfloat16, config=config, page_size=page_size) for _ in range(2)
    ]
    for cache in caches:
        torch.manual_seed(1)
        fill(cache, 20, [20, 8, 1])
    replayed, eager = caches
    q, (k, v) = queries(eager, 1), new_tokens(eager, 1)
    for cache in caches:  # the dense layer is not captured
        hata.decode_attention(q, k, v, cache, DENSE, WEIGHTS)
        hata.decode_attention(q, k, v, cache, SPARSE, WEIGHTS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hata.decode_attention(q, k, v, replayed, SPARSE, WEIGHTS)
    for _ in range(20):
        for static, fresh in zip(
            (q, k, v), (queries(eager, 1), *new_tokens(eager, 1)), strict=True
        ):
            static.copy_(fresh)
        for cache in caches:
            cache.extend(1)
            hata.decode_attention(q, k, v, cache, DENSE, WEIGHTS)
        graph.replay()
        out = hata.decode_attention(q, k, v, eager, SPARSE, WEIGHTS)
        assert_equal(captured, out)
        assert_equal(replayed.last_selection(SPARSE)[0], eager.last_selection(SPARSE)[0])
    for now, then in zip(contents(replayed), contents(eager), strict=True):
        assert_equal(now, then)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_dense_layer_cannot_be_captured() -> None:
    cache = make_cache("cuda", torch.bfloat16, config=FEW)
    fill(cache, 5)
    cache.extend(1)
    q, (k, v) = queries(cache, 1), new_tokens(cache, 1)
    with (
        pytest.raises(ValueError, match="layer_idx must be at least num_dense_layers=1 while"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        hata.decode_attention(q, k, v, cache, DENSE, WEIGHTS)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_idx": -1}, "layer_idx must be in 0..1, got -1"),
        ({"q": torch.zeros(3, 1, 6, 32)}, "q must have shape [batch=3, q_len, num_heads, head_dim"),
        ({"indices": torch.zeros(3, 2, 2, 9)}, "indices must have shape [batch=3, q_len=1"),
        ({"indices": torch.zeros(3, 1, 2, 9)}, "indices must be torch.int32, got torch.float32"),
    ],
)
def test_attention_mass_rejects(device: str, changes: dict[str, Any], message: str) -> None:
    cache = make_cache(device, torch.float16, config=FEW)
    fill(cache, 10)
    indices = torch.zeros(3, 1, 2, 9, dtype=torch.int32)
    arguments = {"q": queries(cache, 1), "layer_idx": SPARSE, "indices": indices, **changes}
    moved = {k: t.to(device) if isinstance(t, Tensor) else t for k, t in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(f"hata.attention_mass: {message}")):
        hata.attention_mass(cache=cache, **moved)
