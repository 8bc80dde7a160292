"""Random shapes: every operator of a decoding step equals the reference, whatever it is given."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hata
from cases import integer_vectors, random_indices, random_planes, random_vectors
from closeness import (
    assert_equal,
    assert_same_caches,
    assert_within_rounding,
)
from decode_cases import make_decode_case
from hata import reference
from property_cases import shapes


def assert_all_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a.cpu(), e)


@given(data=st.data())
def test_hamming_score_and_score_select(device, algorithm, data):
    shape = data.draw(shapes(device))
    caches = shape.caches()
    weight_sum = hata.plane_weight_sum(shape.query_bits, shape.group)
    rows = (shape.batch, shape.q_len, shape.num_kv_heads)
    planes = random_planes(*rows, weight_sum, shape.num_bits, device=device)
    on_cpu = caches.clone("cpu")
    scored = {"weight_sum": weight_sum, "max_seq_len": caches.capacity}
    scores = hata.hamming_score(planes, *caches.codes, **scored)
    expected_scores = reference.hamming_score(planes.cpu(), *on_cpu.codes, **scored)
    assert_equal(scores.cpu(), expected_scores)
    budget = {**shape.budget, "return_cut": True}
    expected = reference.select_topk(expected_scores, on_cpu.cache_seqlens, **budget)
    selected = hata.score_select(planes, *caches.codes, weight_sum=weight_sum, **budget)
    assert_all_equal(selected, expected)


@given(data=st.data(), distinct=st.sampled_from([1, 3, 40, 2**14]))
def test_select_topk(device, data, distinct):
    shape = data.draw(shapes(device))
    torch.manual_seed(shape.seed)
    dtype = data.draw(st.sampled_from([torch.int32, torch.float16, torch.float32]))
    width = max(shape.seq_lens) + data.draw(st.integers(0, 9))
    rows = (shape.batch, shape.q_len, shape.num_kv_heads)
    scores = torch.randint(-distinct, distinct, (*rows, width)).to(dtype)
    lengths = torch.tensor(shape.seq_lens, dtype=torch.int32)
    budget = {**shape.budget, "return_cut": True}
    expected = reference.select_topk(scores, lengths, **budget)
    where = (scores.to(device), lengths.to(device))
    assert_all_equal(hata.select_topk(*where, **budget), expected)


@given(data=st.data())
def test_gather_attention(device, data):
    shape = data.draw(shapes(device))
    caches = shape.caches()
    num_heads = shape.num_kv_heads * shape.group
    dims = (shape.batch, shape.q_len, num_heads, shape.head_dim)
    q = random_vectors(*dims, dtype=shape.dtype, device=device)
    rows = (shape.seq_lens, shape.q_len, shape.num_kv_heads, shape.top_k)
    indices = random_indices(*rows, device=device)
    attended = hata.gather_attention(q, *caches.kv, indices)
    on_cpu = caches.clone("cpu")
    q = q.cpu()
    truth = reference.gather_attention(q.double(), *on_cpu.double().kv, indices.cpu())
    kv = (on_cpu.k_cache, on_cpu.v_cache)
    assert_within_rounding(tuple(t.cpu() for t in attended), truth, q, *kv, shape.top_k)


@given(data=st.data())
def test_dense_attention(device, data):
    shape = data.draw(shapes(device))
    caches = shape.caches()
    dims = (shape.batch, shape.q_len, shape.num_kv_heads * shape.group, shape.head_dim)
    q = random_vectors(*dims, dtype=shape.dtype, device=device)
    min_sparse_len = data.draw(st.one_of(st.none(), st.integers(0, 160)))
    attended = hata.dense_attention(q, *caches.kv, min_sparse_len=min_sparse_len)
    on_cpu = caches.clone("cpu")
    q = q.cpu()
    truth = reference.dense_attention(
        q.double(), *on_cpu.double().kv, min_sparse_len=min_sparse_len
    )
    kv = (on_cpu.k_cache, on_cpu.v_cache)
    longest = max(shape.seq_lens)
    assert_within_rounding(tuple(t.cpu() for t in attended), truth, q, *kv, longest)


@given(data=st.data())
def test_cache_append(device, data):
    shape = data.draw(shapes(device))
    caches = shape.caches()
    expected = caches.clone("cpu")
    dims = (shape.batch, shape.q_len, shape.num_kv_heads, shape.head_dim)
    k, v = (integer_vectors(*dims, dtype=shape.dtype, device=device) for _ in range(2))
    dims = (shape.num_kv_heads, shape.head_dim, shape.num_bits)
    key_weights = integer_vectors(*dims, dtype=shape.dtype, device=device)
    new_seqlens = None
    if data.draw(st.booleans()):
        new_seqlens = torch.randint(0, shape.q_len + 1, (shape.batch,)).int()
    hata.cache_append(
        *(k, v, key_weights, *caches.all),
        new_seqlens=None if new_seqlens is None else new_seqlens.to(device),
    )
    reference.cache_append(
        *(k.cpu(), v.cpu(), key_weights.cpu(), *expected.all),
        new_seqlens=new_seqlens,
    )
    assert_same_caches(caches, expected)


@given(data=st.data())
def test_decode_step(device, algorithm, data):
    """On integers, whose projections are exact, the codes and the selection are the reference's."""
    shape = data.draw(shapes(device))
    torch.manual_seed(shape.seed)
    settings = {"query_bits": shape.query_bits, **shape.budget}
    case = make_decode_case(
        shape.seq_lens,
        **shape.cache_shape,
        **settings,
        q_len=shape.q_len,
        group=shape.group,
        draw=integer_vectors,
    )
    expected = case.caches.clone("cpu").double()
    q, k, v = (t.cpu() for t in (case.q, case.k, case.v))
    result = case.run()
    out, lse, indices, num_selected = reference.decode_step(
        *(t.double() for t in (q, k, v)),
        *(t.cpu() for t in (case.key_weights, case.query_weights)),
        *expected.all,
        **settings,
    )
    assert_all_equal((result.indices, result.num_selected), (indices, num_selected))
    after = case.caches.clone("cpu")
    for a, e in zip(after.double().all, expected.all, strict=True):
        if e is not None:
            assert_equal(a, e)
    attended = (result.out.cpu(), result.lse.cpu())
    kv = (after.k_cache, after.v_cache)
    assert_within_rounding(attended, (out, lse), q, *kv, shape.top_k)
