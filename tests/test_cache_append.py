import pytest
import torch

from cases import LAYOUTS, Caches, integer_vectors, make_caches, random_vectors, strided
from closeness import assert_equal, assert_same_caches
from devices import gpu_only
from hata import cache_append, hash_encode, reference


def append(caches: Caches, k, v, key_weights, *, op=cache_append, new_seqlens=None) -> None:
    op(k, v, key_weights, *caches.all, new_seqlens=new_seqlens)


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64, None])
def test_matches_the_reference(device, page_size, layout, key_norms):
    seq_lens, q_len = [53, 8, 1, 0, 64], 9
    caches = make_caches(
        seq_lens, device=device, page_size=page_size, layout=layout, key_norms=key_norms
    )
    expected = caches.clone()
    k, v = (integer_vectors(5, q_len, 2, 64, dtype=torch.float16, device=device) for _ in range(2))
    key_weights = integer_vectors(2, 64, 64, dtype=torch.float16, device=device)
    append(caches, k, v, key_weights)
    append(expected, k, v, key_weights, op=reference.cache_append)
    assert_same_caches(caches, expected)


@pytest.mark.parametrize(
    ("head_dim", "num_bits"),
    [*((64, n) for n in range(32, 257, 32)), (96, 64), (128, 128), (192, 96), (256, 256)],
)
def test_every_head_dim_and_number_of_bits(device, dtype, head_dim, num_bits):
    shape = {"head_dim": head_dim, "num_bits": num_bits, "num_kv_heads": 3}
    caches = make_caches([21, 40], device=device, dtype=dtype, key_norms=True, **shape)
    expected = caches.clone()
    k, v = (integer_vectors(2, 21, 3, head_dim, dtype=dtype, device=device) for _ in range(2))
    key_weights = integer_vectors(3, head_dim, num_bits, dtype=dtype, device=device)
    append(caches, k, v, key_weights)
    append(expected, k, v, key_weights, op=reference.cache_append)
    assert_same_caches(caches, expected)


@pytest.mark.parametrize("q_len", [1, 21])  # CUDA gives words to blocks otherwise from 17 on
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_codes_keys_and_values_are_all_that_is_written(device, dtype, layout, q_len):
    caches = make_caches([53, 8, 0, 64], device=device, dtype=dtype, layout=layout)
    expected = caches.clone()
    k, v = (random_vectors(4, q_len, 2, 64, dtype=dtype, device=device) for _ in range(2))
    k_cache, v_cache, *tables = caches.kv
    cache_append(strided(k), strided(v), None, k_cache, v_cache, None, None, *tables)
    reference.cache_append(k, v, None, *expected.kv[:2], None, None, *tables)
    assert_same_caches(caches, expected)


def test_only_new_tokens_are_written(device):
    caches = make_caches([53, 30, 16, 5], device=device, key_norms=True)
    expected = caches.clone()
    k, v = (integer_vectors(4, 7, 2, 64, dtype=torch.float16, device=device) for _ in range(2))
    key_weights = integer_vectors(2, 64, 64, dtype=torch.float16, device=device)
    new_seqlens = torch.tensor([7, 3, 0, 5], dtype=torch.int32, device=device)
    append(caches, k, v, key_weights, new_seqlens=new_seqlens)
    append(expected, k, v, key_weights, op=reference.cache_append, new_seqlens=new_seqlens)
    assert_same_caches(caches, expected)


def test_one_token_at_a_time_equals_a_whole_prompt(device, dtype):
    """Codes and norms too, for any keys: a key has one code, however it came into the cache."""
    whole = make_caches([37, 37], device=device, dtype=dtype, num_bits=96, key_norms=True)
    single = whole.clone()
    k, v = (random_vectors(2, 37, 2, 64, dtype=dtype, device=device) for _ in range(2))
    key_weights = random_vectors(2, 64, 96, dtype=dtype, device=device)
    append(whole, k, v, key_weights)
    for j in range(37):
        single.cache_seqlens.fill_(j + 1)
        append(single, k[:, j : j + 1], v[:, j : j + 1], key_weights)
    assert_same_caches(single, whole)


def test_codes_are_those_of_hash_encode(device, dtype):
    k, v = (random_vectors(3, 35, 2, 128, dtype=dtype, device=device) for _ in range(2))
    key_weights = random_vectors(2, 128, 64, dtype=dtype, device=device)
    shape = {"head_dim": 128, "num_bits": 64, "page_size": None, "key_norms": True}
    caches = make_caches([35, 35, 35], device=device, dtype=dtype, **shape)
    append(caches, strided(k), strided(v), key_weights)
    codes, norms = hash_encode(k, key_weights, key_norms=True)
    pages = caches.block_table[:, 0].long()
    assert_equal(caches.code_cache[pages, :, :35], codes)
    assert_equal(caches.norm_cache[pages, :, :35], norms)
    assert_equal(caches.k_cache[pages, :35], k)
    assert_equal(caches.v_cache[pages, :35], v)


@pytest.mark.parametrize(("batch", "q_len"), [(0, 3), (2, 0)])
def test_accepts_no_tokens(device, batch, q_len):
    caches = make_caches([20, 20], device=device)
    expected = caches.clone()
    k = random_vectors(batch, q_len, 2, 64, dtype=torch.float16, device=device)
    key_weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    tables = (caches.block_table[:batch], caches.cache_seqlens[:batch])
    cache_append(k, k, key_weights, *caches.all[:4], *tables)
    assert_same_caches(caches, expected)


def test_batch_past_65535(device):
    batch = 70_000
    k = random_vectors(batch, 1, 1, 64, dtype=torch.float16, device=device)
    key_weights = random_vectors(1, 64, 32, dtype=torch.float16, device=device)
    k_cache, v_cache = torch.empty(2, batch, 1, 1, 64, dtype=torch.float16, device=device)
    code_cache = torch.empty(batch, 1, 1, 1, dtype=torch.int32, device=device)
    block_table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    ones = torch.ones(batch, dtype=torch.int32, device=device)
    cache_append(k, -k, key_weights, k_cache, v_cache, code_cache, None, block_table, ones)
    assert_equal(k_cache, k)
    assert_equal(v_cache, -k)
    assert_equal(code_cache, hash_encode(k, key_weights))


@gpu_only
def test_nothing_is_written_out_of_range():
    """CUDA skips what the CPU reports."""
    caches = make_caches([40, 40, 40], device="cuda", key_norms=True)
    expected = caches.clone()
    k = random_vectors(3, 2, 2, 64, dtype=torch.float16, device="cuda")
    key_weights = random_vectors(2, 64, 64, dtype=torch.float16, device="cuda")
    caches.cache_seqlens.copy_(torch.tensor([-3, 2**31 - 1, caches.capacity + 2]))
    append(caches, k, k, key_weights)
    caches.cache_seqlens.fill_(2)
    for page in (-1, len(caches.k_cache), 2**31 - 1):
        caches.block_table[:, 0] = page
        append(caches, k, k, key_weights)
    assert_same_caches(caches, expected)


@pytest.mark.parametrize("key_norms", [False, True])
def test_opcheck(device, key_norms):
    caches = make_caches([20, 7], device=device, page_size=4, key_norms=key_norms)
    k = random_vectors(2, 3, 2, 64, dtype=torch.float16, device=device)
    key_weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    new_seqlens = torch.tensor([3, 2], dtype=torch.int32, device=device)
    torch.library.opcheck(
        torch.ops.hata.cache_append.default,
        (k, k.clone(), key_weights, *caches.all, new_seqlens),
    )


def test_opcheck_without_codes(device):
    caches = make_caches([20, 7], device=device, page_size=4)
    k = random_vectors(2, 3, 2, 64, dtype=torch.float16, device=device)
    k_cache, v_cache, *tables = caches.kv
    arguments = (k, k.clone(), None, k_cache, v_cache, None, None, *tables)
    torch.library.opcheck(torch.ops.hata.cache_append.default, arguments)
