"""torch.compile(fullgraph=True) takes every wrapper whole and changes nothing."""

from typing import Any

import pytest
import torch

import hata
from cases import make_caches, poisoned, random_indices, random_planes, random_vectors
from closeness import assert_equal
from decode_cases import make_decode_case


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def assert_compiles(op, *args, out=None, **options) -> None:
    """A compiled run gives what an eager one did, into outputs that were poisoned again."""
    options = options if out is None else {**options, "out": out}
    expected = [t.clone() for t in tensors(op(*args, **options))]
    for t in tensors(out):
        t.fill_(-7)
    actual = torch.compile(op, fullgraph=True, backend="aot_eager")(*args, **options)
    for a, e in zip(tensors(actual), expected, strict=True):
        assert_equal(a, e)


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    if result is None:
        return ()
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.mark.parametrize("key_norms", [False, True])
def test_hash_encode(device, key_norms):
    keys = random_vectors(2, 9, 2, 64, dtype=torch.float16, device=device)
    weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    assert_compiles(hata.hash_encode, keys, weights, key_norms=key_norms)
    codes = poisoned(2, 2, 9, 2, dtype=torch.int32, device=device)
    norms = poisoned(2, 2, 9, dtype=torch.float16, device=device)
    out = (codes, norms) if key_norms else codes
    assert_compiles(hata.hash_encode, keys, weights, key_norms=key_norms, out=out)


@pytest.mark.parametrize("query_bits", [1, 4])
def test_encode_query(device, query_bits):
    q = random_vectors(2, 3, 6, 64, dtype=torch.float16, device=device)
    weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    assert_compiles(hata.encode_query, q, weights, query_bits)
    out = torch.zeros_like(hata.encode_query(q, weights, query_bits))
    assert_compiles(hata.encode_query, q, weights, query_bits, out=out)


def test_cache_append(device):
    caches = make_caches([20, 7], device=device, key_norms=True)
    expected = caches.clone()
    k, v = (random_vectors(2, 3, 2, 64, dtype=torch.float16, device=device) for _ in range(2))
    weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    new = torch.tensor([3, 1], dtype=torch.int32, device=device)

    def append(where) -> None:
        norms = where.norm_cache
        hata.cache_append(k, v, weights, *where.all, norm_cache=norms, new_seqlens=new)

    append(expected)
    torch.compile(append, fullgraph=True, backend="aot_eager")(caches)
    for name in ("k_cache", "v_cache", "code_cache", "norm_cache"):
        assert_equal(getattr(caches, name), getattr(expected, name))


@pytest.mark.parametrize("key_norms", [False, True])
def test_hamming_score_and_select_topk(device, key_norms):
    caches = make_caches([40, 7], device=device, key_norms=key_norms)
    planes = random_planes(2, 3, 2, 7, 64, device=device)

    def scored_and_selected(planes, caches):
        norms = caches.norm_cache
        scores = hata.hamming_score(
            planes, *caches.codes, weight_sum=7, max_seq_len=40, norm_cache=norms
        )
        again = hata.hamming_score(
            planes,
            *caches.codes,
            weight_sum=7,
            max_seq_len=40,
            norm_cache=norms,
            out=torch.empty_like(scores),
        )
        selected = hata.select_topk(scores, caches.cache_seqlens, 8, num_sink=1)
        buffers = tuple(map(torch.empty_like, selected))
        return (
            scores,
            again,
            *selected,
            *hata.select_topk(again, caches.cache_seqlens, 8, num_recent=1, out=buffers),
        )

    assert_compiles(scored_and_selected, planes, caches)


@pytest.mark.parametrize("with_out", [False, True])
def test_score_select(device, with_out):
    caches = make_caches([40, 7], device=device)
    planes = random_planes(2, 3, 2, 7, 64, device=device)
    indices = poisoned(2, 3, 2, 8, dtype=torch.int32, device=device)
    num_selected = poisoned(2, 3, 2, dtype=torch.int32, device=device)
    out = (indices, num_selected) if with_out else None
    assert_compiles(hata.score_select, planes, *caches.codes, 8, weight_sum=7, out=out)


@pytest.mark.parametrize("with_out", [False, True])
def test_gather_attention_and_merge(device, with_out):
    caches = make_caches([40, 7], device=device)
    q = random_vectors(2, 3, 6, 64, dtype=torch.float16, device=device)
    indices = random_indices([40, 7], 3, 2, 8, device=device)
    out = (torch.zeros_like(q), torch.zeros(2, 3, 6, device=device)) if with_out else None

    def attended_twice(q, caches, indices, out=None):
        first = hata.gather_attention(q, *caches.kv, indices, out=out)
        second = hata.gather_attention(q, *caches.kv, indices.flip(-1).contiguous())
        merged = hata.merge_attention_states(*first, *second)
        buffers = tuple(map(torch.empty_like, merged))
        return (*first, *merged, *hata.merge_attention_states(*first, *second, out=buffers))

    assert_compiles(attended_twice, q, caches, indices, out=out)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_decode_step(device, backend):
    case = make_decode_case([40, 7], device=device, q_len=2, key_norms=True)
    eager = case.clone()
    expected = eager.run()
    actual = torch.compile(lambda c: c.run(), fullgraph=True, backend=backend)(case)
    assert isinstance(actual, hata.DecodeStepOutput)
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e)
    for name in ("k_cache", "v_cache", "code_cache", "norm_cache"):
        assert_equal(getattr(case.caches, name), getattr(eager.caches, name))


def test_decode_step_for_other_batches_and_budgets(device):
    """Sizes that torch.compile takes for dynamic the second time."""
    compiled = torch.compile(lambda c: c.run(), fullgraph=True, backend="aot_eager")
    for seq_lens, top_k in (([40, 7], 16), ([90, 30, 2], 20), ([9], 24)):
        case = make_decode_case(seq_lens, device=device, top_k=top_k)
        expected = case.clone().run()
        for a, e in zip(compiled(case), expected, strict=True):
            assert_equal(a, e)
