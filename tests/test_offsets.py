"""Offsets past 2^31 elements: values far apart give what the same values give close together."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hata
from cases import make_caches, random_planes, random_vectors
from closeness import assert_equal
from decode_cases import make_decode_case
from devices import gpu_only

FAR = 2**30 + 64  # elements; the rows of three lie on both sides of 2^31


@pytest.fixture(autouse=True)
def _memory_back() -> Iterator[None]:
    """Gigabytes go back to the GPU, for the tests that run beside these."""
    yield
    torch.cuda.empty_cache()


def far(t: Tensor) -> Tensor:
    """The same values with a first dimension of three whose rows are FAR apart.

    Nothing between them is touched: a CPU needs no memory for it.
    """
    assert t.shape[0] == 3
    inner = t[0].contiguous().stride()
    spread = torch.empty(2 * FAR + t[0].numel(), dtype=t.dtype, device=t.device)
    return spread.as_strided(t.shape, (FAR, *inner)).copy_(t)


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "code_cache", "norm_cache"])
def test_pages(device, algorithm, name):
    """The whole step writes and reads a cache whose pages are far apart."""
    case = make_decode_case([40], device=device, q_len=2, key_norms=True)
    pages = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    caches = {key: t[:3] for key, t in vars(case.caches).items() if key.endswith("cache")}
    near = replace(case, caches=replace(case.caches, block_table=pages, **caches).clone())
    spread = {name: far(getattr(near.caches, name))}
    apart = replace(near, caches=replace(near.caches.clone(), **spread))
    for a, e in zip(apart.run(), near.run(), strict=True):
        assert_equal(a, e)
    for key in caches:
        assert_equal(getattr(apart.caches, key), getattr(near.caches, key))
    dense = [hata.dense_attention(each.q, *each.caches.kv) for each in (apart, near)]
    for a, e in zip(*dense, strict=True):
        assert_equal(a, e)


def test_keys(device):
    keys = random_vectors(3, 20, 2, 64, dtype=torch.float16, device=device)
    key_weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    assert_equal(hata.hash_encode(far(keys), key_weights), hata.hash_encode(keys, key_weights))


def test_queries(device):
    q = random_vectors(3, 2, 6, 64, dtype=torch.float16, device=device)
    query_weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    near = hata.encode_query(q, query_weights, query_bits=4)
    assert_equal(hata.encode_query(far(q), query_weights, query_bits=4), near)


def test_scores_that_are_selected_from(device):
    scores = torch.randint(-9, 9, (3, 1, 2, 100), dtype=torch.int32).to(device)
    lengths = torch.full((3,), 100, dtype=torch.int32, device=device)
    near = hata.select_topk(scores, lengths, top_k=20)
    for a, e in zip(hata.select_topk(far(scores), lengths, top_k=20), near, strict=True):
        assert_equal(a, e)


@gpu_only
@pytest.mark.parametrize("key_norms", [False, True])
def test_scores_that_are_written(key_norms):
    caches = make_caches([90, 40, 77], device="cuda", key_norms=key_norms)
    planes = random_planes(3, 1, 2, 15, 64, device="cuda")

    def scores(max_seq_len: int) -> Tensor:
        return hata.hamming_score(planes, *caches.codes, weight_sum=15, max_seq_len=max_seq_len)

    wide, narrow = scores(2**29 + 8), scores(96)  # 6 rows: the last ones begin past 2^31
    assert_equal(wide[..., :96], narrow)
    assert (wide[-1, :, :, 96::1001] == narrow[0, 0, 0, 95]).all()  # not in sight


@gpu_only
def test_indices_that_are_written():
    width = 2**29 + 8  # 6 rows, all of the same scores: the last indices begin past 2^31
    scores = torch.randint(-9, 9, (width,), dtype=torch.int32, device="cuda").expand(3, 1, 2, -1)
    lengths = torch.tensor([100, 7, 90], dtype=torch.int32, device="cuda")
    wide, counts = hata.select_topk(scores, lengths, top_k=width)
    narrow, expected_counts = hata.select_topk(scores[..., :100], lengths, top_k=100)
    assert_equal(wide[..., :100], narrow)
    assert_equal(counts, expected_counts)
    assert (wide[-1, :, :, 100::1001] == -1).all()


@gpu_only
@pytest.mark.parametrize("key_norms", [False, True])
def test_a_capacity_whose_keys_pass_2_31(algorithm, key_norms):
    """Sequences share one page, as long as clusters take; the workspace has keys for each."""
    capacity, batch = (2**29, 3) if algorithm in ("auto", "two_kernels") else (2**24, 66)
    near = make_caches([3000], device="cuda", page_size=None, key_norms=key_norms)
    page = int(near.block_table[0, 0])
    codes = torch.empty(1, 2, capacity, 2, dtype=torch.int32, device="cuda")
    codes[0, :, :3000] = near.code_cache[page, :, :3000]
    norms = None
    if key_norms:
        norms = torch.empty(1, 2, capacity, dtype=torch.float16, device="cuda")
        norms[0, :, :3000] = near.norm_cache[page, :, :3000]
    planes = random_planes(batch, 1, 2, 15, 64, device="cuda")
    lengths = torch.tensor([3000, 1, 2900], dtype=torch.int32, device="cuda").repeat(batch // 3)
    table = torch.zeros(batch, 1, dtype=torch.int32, device="cuda")
    settings = {"weight_sum": 15, "top_k": 64, "num_recent": 4}
    selected = hata.score_select(planes, codes, norms, table, lengths, **settings)
    expected = hata.score_select(
        planes, near.code_cache, near.norm_cache, table + page, lengths, **settings
    )
    for a, e in zip(selected, expected, strict=True):
        assert_equal(a, e)


@gpu_only
def test_merged_states():
    rows = (2**31 // 64 + 100, 1, 1)
    out_a, out_b = (torch.zeros(*rows, 64, dtype=torch.float16, device="cuda") for _ in range(2))
    lse = torch.zeros(rows, device="cuda")
    out_a[-3:], out_b[-3:] = 1, 2
    out, merged_lse = hata.merge_attention_states(out_a, lse, out_b, lse)
    assert (out[-3:] == 1.5).all()
    assert (out[:-3:1001] == 0).all()
    torch.testing.assert_close(merged_lse, torch.full_like(lse, math.log(2)))
