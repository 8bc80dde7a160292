import pytest
import torch

from cases import LAYOUTS, make_caches, random_planes
from closeness import assert_equal
from hata import hamming_score, hash_encode, reference

SEQ_LENS = [53, 1, 0, 5, 64]


def score(planes, caches, weight_sum, max_seq_len=None, *, op=hamming_score):
    return op(
        planes,
        *caches.codes,
        weight_sum=weight_sum,
        max_seq_len=caches.capacity if max_seq_len is None else max_seq_len,
    )


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64, None])
def test_matches_the_reference(device, page_size, layout, key_norms):
    """Bit for bit, the float16 scores too."""
    shape = {"page_size": page_size, "layout": layout, "num_bits": 96, "key_norms": key_norms}
    caches = make_caches(SEQ_LENS, device=device, **shape)
    planes = random_planes(5, 8, 2, 15, 96, device=device)
    scores = score(planes, caches, 15)
    assert scores.dtype == (torch.float16 if key_norms else torch.int32)
    assert_equal(scores, score(planes, caches, 15, op=reference.hamming_score))


@pytest.mark.parametrize("weight_sum", [1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 20, 255])
@pytest.mark.parametrize("key_norms", [False, True])
def test_any_weight_sum(device, weight_sum, key_norms):
    caches = make_caches([37], device=device, key_norms=key_norms)
    planes = random_planes(1, 2, 2, weight_sum, 64, device=device)
    scores = score(planes, caches, weight_sum)
    assert_equal(scores, score(planes, caches, weight_sum, op=reference.hamming_score))


@pytest.mark.parametrize("num_bits", range(32, 257, 32))
@pytest.mark.parametrize("q_len", [1, 3, 9])
def test_any_number_of_bits_and_query_tokens(device, num_bits, q_len):
    for key_norms in (False, True):
        shape = {"num_kv_heads": 3, "num_bits": num_bits, "key_norms": key_norms}
        caches = make_caches([29, 4], device=device, **shape)
        planes = random_planes(2, q_len, 3, 15, num_bits, device=device)
        expected = score(planes, caches, 15, op=reference.hamming_score)
        assert_equal(score(planes, caches, 15), expected)


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("page_size", [1, 16, 1024, 2048, None])
def test_long_sequences(device, page_size, key_norms):
    """Past the tile of any kernel, and not a multiple of one; pages shorter and longer than it."""
    shape = {"num_kv_heads": 3, "page_size": page_size, "key_norms": key_norms}
    caches = make_caches([5200, 0, 1030], device=device, **shape)
    planes = random_planes(3, 2, 3, 15, 64, device=device)
    for max_seq_len in (5200, 3000):
        expected = score(planes, caches, 15, max_seq_len, op=reference.hamming_score)
        assert_equal(score(planes, caches, 15, max_seq_len), expected)


def test_a_key_scores_highest_with_its_own_code(device):
    keys = torch.randn(1, 50, 1, 64).half().to(device)
    codes = hash_encode(keys, torch.randn(1, 64, 64).half().to(device))
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    seqlens = torch.full((1,), 50, dtype=torch.int32, device=device)
    tables = (None, table, seqlens)
    planes = codes[:, :, 17].view(1, 1, 1, 1, 2)
    scores = hamming_score(planes, codes, *tables, weight_sum=1, max_seq_len=50)
    assert scores[0, 0, 0, 17] == scores.max() == 64
    scores = hamming_score(~planes, codes, *tables, weight_sum=1, max_seq_len=50)
    assert scores[0, 0, 0, 17] == scores.min() == -64


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("max_seq_len", [0, 7, 53, 200])
def test_any_width(device, max_seq_len, key_norms):
    caches = make_caches(SEQ_LENS, device=device, key_norms=key_norms)
    planes = random_planes(5, 2, 2, 7, 64, device=device)
    expected = score(planes, caches, 7, max_seq_len, op=reference.hamming_score)
    assert_equal(score(planes, caches, 7, max_seq_len), expected)


def test_accepts_an_empty_batch(device):
    caches = make_caches([20], device=device)
    planes = random_planes(0, 1, 2, 7, 64, device=device)
    tensors = (caches.code_cache, None, caches.block_table[:0], caches.cache_seqlens[:0])
    scores = hamming_score(planes, *tensors, weight_sum=7, max_seq_len=20)
    assert scores.shape == (0, 1, 2, 20)


def test_batch_past_65535(device):
    caches = make_caches([9], device=device, num_kv_heads=1, page_size=None)
    planes = random_planes(7, 1, 1, 3, 64, device=device)
    table, seqlens = caches.block_table.expand(70_000, -1), caches.cache_seqlens.expand(70_000)
    scores = hamming_score(
        planes.repeat(10_000, 1, 1, 1, 1),
        caches.code_cache,
        None,
        table.contiguous(),
        seqlens.contiguous(),
        weight_sum=3,
        max_seq_len=9,
    )
    few = hamming_score(
        planes,
        caches.code_cache,
        None,
        table[:7].contiguous(),
        seqlens[:7].contiguous(),
        weight_sum=3,
        max_seq_len=9,
    )
    assert_equal(scores, few.repeat(10_000, 1, 1, 1))


@pytest.mark.parametrize("key_norms", [False, True])
def test_opcheck(device, key_norms):
    caches = make_caches([20, 7], device=device, page_size=32, key_norms=key_norms)
    planes = random_planes(2, 3, 2, 7, 64, device=device)
    torch.library.opcheck(torch.ops.hata.hamming_score.default, (planes, *caches.codes, 7, 32))
