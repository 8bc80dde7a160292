import pytest
import torch

from cases import LAYOUTS, Caches, integer_vectors, make_caches, random_vectors, strided
from closeness import assert_equal, assert_same_caches
from devices import gpu_only
from hata import cache_append, cache_write, hash_encode, reference


def write(caches: Caches, k, v, key_weights, slots, *, op=cache_write) -> None:
    where = (caches.k_cache, caches.v_cache, caches.code_cache, caches.norm_cache)
    op(k, v, key_weights, *where, slots)


def random_slots(caches: Caches, num_tokens: int) -> torch.Tensor:
    """Distinct rows of the whole pool in random order; every fifth token is padding."""
    num_slots = caches.k_cache.shape[0] * caches.k_cache.shape[1]
    slots = torch.randperm(num_slots)[:num_tokens]
    slots[::5] = -1
    return slots.to(caches.k_cache.device)


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("num_tokens", [1, 16, 67])
def test_matches_the_reference(device, num_tokens, page_size, layout, key_norms):
    caches = make_caches(
        [53, 40, 64], device=device, page_size=page_size, layout=layout, key_norms=key_norms
    )
    expected = caches.clone()
    k, v = (integer_vectors(num_tokens, 2, 64, dtype=torch.float16, device=device) for _ in "kv")
    key_weights = integer_vectors(2, 64, 64, dtype=torch.float16, device=device)
    slots = random_slots(caches, num_tokens)
    write(caches, strided(k), strided(v), key_weights, slots)
    write(expected, k, v, key_weights, slots, op=reference.cache_write)
    assert_same_caches(caches, expected)


@pytest.mark.parametrize(("head_dim", "num_bits"), [(64, 256), (96, 64), (128, 128), (256, 96)])
def test_equals_cache_append(device, dtype, head_dim, num_bits):
    """For any keys: a prompt's codes are those of its tokens appended one at a time."""
    shape = {"head_dim": head_dim, "num_bits": num_bits, "num_kv_heads": 3}
    caches = make_caches([37], device=device, dtype=dtype, key_norms=True, **shape)
    expected = caches.clone()
    k, v = (random_vectors(37, 3, head_dim, dtype=dtype, device=device) for _ in "kv")
    key_weights = random_vectors(3, head_dim, num_bits, dtype=dtype, device=device)
    cache_append(k[None], v[None], key_weights, *expected.all)
    t = torch.arange(37, device=device)
    slots = caches.block_table[0, t // 16].long() * 16 + t % 16
    write(caches, k[:30], v[:30], key_weights, slots[:30])
    for j in range(30, 37):
        write(caches, k[j : j + 1], v[j : j + 1], key_weights, slots[j : j + 1])
    assert_same_caches(caches, expected)


def test_keys_and_values_in_one_tensor(device):
    """A cache as vLLM keeps it: the values behind the keys of each row."""
    kv_cache = torch.zeros(4, 2, 16, 128, dtype=torch.float16, device=device)
    k_cache, v_cache = kv_cache.transpose(1, 2).split(64, -1)
    code_cache = torch.zeros(4, 2, 16, 2, dtype=torch.int32, device=device)
    k, v = (random_vectors(20, 2, 64, dtype=torch.float16, device=device) for _ in "kv")
    key_weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    slots = torch.arange(20, 40, device=device)
    cache_write(k, v, key_weights, k_cache, v_cache, code_cache, None, slots)
    assert_equal(kv_cache.transpose(1, 2).flatten(0, 1)[20:40], torch.cat([k, v], -1))
    codes = hash_encode(k[None], key_weights)[0].transpose(0, 1)
    assert_equal(code_cache.transpose(1, 2).flatten(0, 1)[20:40], codes)


def test_accepts_no_tokens(device):
    caches = make_caches([20, 20], device=device)
    expected = caches.clone()
    k = random_vectors(0, 2, 64, dtype=torch.float16, device=device)
    key_weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    write(caches, k, k, key_weights, torch.empty(0, dtype=torch.int64, device=device))
    assert_same_caches(caches, expected)


@gpu_only
def test_nothing_is_written_out_of_range():
    """CUDA skips what the CPU reports."""
    caches = make_caches([40, 40, 40], device="cuda", key_norms=True)
    expected = caches.clone()
    k = random_vectors(3, 2, 64, dtype=torch.float16, device="cuda")
    key_weights = random_vectors(2, 64, 64, dtype=torch.float16, device="cuda")
    num_slots = caches.k_cache.shape[0] * caches.k_cache.shape[1]
    write(caches, k, k, key_weights, torch.tensor([num_slots, 2**62, -(2**62)], device="cuda"))
    assert_same_caches(caches, expected)


@pytest.mark.parametrize("key_norms", [False, True])
def test_opcheck(device, key_norms):
    caches = make_caches([20, 7], device=device, page_size=4, key_norms=key_norms)
    k = random_vectors(6, 2, 64, dtype=torch.float16, device=device)
    key_weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    where = (caches.k_cache, caches.v_cache, caches.code_cache, caches.norm_cache)
    slots = torch.tensor([3, -1, 9, 0, 1, 2], device=device)
    torch.library.opcheck(
        torch.ops.hata.cache_write.default, (k, k.clone(), key_weights, *where, slots)
    )
