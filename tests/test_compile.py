"""torch.compile(fullgraph=True) takes every wrapper whole and changes nothing."""

from typing import Any

import pytest
import torch

import hata
from cases import make_caches, random_indices, random_planes, random_vectors
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


@pytest.mark.parametrize("query_bits", [1, 4])
def test_encode_query(device, query_bits):
    q = random_vectors(2, 3, 6, 64, dtype=torch.float16, device=device)
    weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    assert_compiles(hata.encode_query, q, weights, query_bits=query_bits)


def test_cache_append(device):
    caches = make_caches([20, 7], device=device, key_norms=True)
    expected = caches.clone()
    k, v = (random_vectors(2, 3, 2, 64, dtype=torch.float16, device=device) for _ in range(2))
    weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    new = torch.tensor([3, 1], dtype=torch.int32, device=device)

    def append(where) -> None:
        hata.cache_append(k, v, weights, *where.all, new_seqlens=new)

    append(expected)
    torch.compile(append, fullgraph=True, backend="aot_eager")(caches)
    for name in ("k_cache", "v_cache", "code_cache", "norm_cache"):
        assert_equal(getattr(caches, name), getattr(expected, name))


@pytest.mark.parametrize("key_norms", [False, True])
def test_hamming_score_and_select_topk(device, key_norms):
    caches = make_caches([40, 7], device=device, key_norms=key_norms)
    planes = random_planes(2, 3, 2, 7, 64, device=device)

    def scored_and_selected(planes, caches):
        scores = hata.hamming_score(planes, *caches.codes, weight_sum=7, max_seq_len=40)
        return scores, *hata.select_topk(scores, caches.cache_seqlens, top_k=8, num_sink=1)

    assert_compiles(scored_and_selected, planes, caches)


def test_score_select(device):
    caches = make_caches([40, 7], device=device)
    planes = random_planes(2, 3, 2, 7, 64, device=device)
    assert_compiles(hata.score_select, planes, *caches.codes, weight_sum=7, top_k=8)


def test_gather_attention_and_merge(device):
    caches = make_caches([40, 7], device=device)
    q = random_vectors(2, 3, 6, 64, dtype=torch.float16, device=device)
    indices = random_indices([40, 7], 3, 2, 8, device=device)

    def attended_twice(q, caches, indices):
        first = hata.gather_attention(q, *caches.kv, indices)
        second = hata.gather_attention(q, *caches.kv, indices.flip(-1).contiguous())
        return (*first, *hata.merge_attention_states(*first, *second))

    assert_compiles(attended_twice, q, caches, indices)


def test_dense_attention(device):
    caches = make_caches([40, 7], device=device)
    q = random_vectors(2, 3, 6, 64, dtype=torch.float16, device=device)
    assert_compiles(hata.dense_attention, q, *caches.kv, min_sparse_len=20)


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
