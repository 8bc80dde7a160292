"""fetch_rows: the row cache's replacement, its contents, and attention over its slots."""

import itertools

import pytest
import torch
from torch import Tensor

import hata
from cases import INT32_MAX, Caches, make_caches, random_indices, random_vectors, row_cache
from closeness import assert_equal
from error_cases import arguments
from hata import reference

STATE = ("k_rows", "v_rows", "slot_of_row", "position_of_slot", "referenced", "hand")


def neighbouring(indices: Tensor, seq_lens: list[int]) -> Tensor:
    """The next step's selection: most of this one's, in another order, some exchanged."""
    fresh = random_indices(seq_lens, 1, indices.shape[2], indices.shape[3], device="cpu")
    following = indices.clone()
    for b, h in itertools.product(range(len(seq_lens)), range(indices.shape[2])):
        kept = indices[b, 0, h]
        kept = kept[(kept >= 0) & (torch.rand(kept.shape) < 0.7)]
        new = [t for t in fresh[b, 0, h].tolist() if t not in kept.tolist() or t < 0]
        following[b, 0, h] = torch.cat([kept, torch.tensor(new, dtype=torch.int32)])[
            : len(fresh[b, 0, h])
        ]
    return following


def assert_as_the_reference(
    caches: Caches, device: str, seq_lens: list[int], top_k: int, num_slots: int, steps: int
) -> None:
    """Outputs and state are the reference's after each of some neighbouring steps."""
    names = ("k_cache", "v_cache", "block_table", "cache_seqlens")
    plain = dict(zip(names, caches.kv, strict=True)) | row_cache(caches, num_slots)
    given = {name: t.to(device, copy=True) for name, t in plain.items()}
    indices = random_indices(seq_lens, 1, caches.k_cache.shape[2], top_k, device="cpu")
    for _ in range(steps):
        expected = reference.fetch_rows(indices, **plain)
        for actual, e in zip(hata.fetch_rows(indices.to(device), **given), expected, strict=True):
            assert_equal(actual.cpu(), e)
        for name in STATE:
            assert_equal(given[name].cpu(), plain[name])
        indices = neighbouring(indices, seq_lens)


@pytest.mark.parametrize(
    ("seq_lens", "top_k", "num_slots", "page_size", "head_dim"),
    [
        ([153, 1, 0, 64], 37, 37, 16, 64),
        ([153, 90], 37, 61, None, 128),
        ([700], 130, 200, 1, 96),
    ],
)
@pytest.mark.parametrize("is_float8", [False, True])
def test_every_step_leaves_the_state_of_the_reference(
    device, dtype, seq_lens, top_k, num_slots, page_size, head_dim, is_float8
):
    shape = {"dtype": torch.float8_e4m3fn if is_float8 else dtype}
    shape |= {"page_size": page_size, "head_dim": head_dim}
    caches = make_caches(seq_lens, device="cpu", **shape)
    assert_as_the_reference(caches, device, seq_lens, top_k, num_slots, steps=5)


def test_lists_and_row_caches_longer_than_a_block_looks_at_once(device):
    caches = make_caches([9000], device="cpu", num_kv_heads=1, page_size=64)
    assert_as_the_reference(caches, device, [9000], 4500, 5003, steps=2)


def test_attention_over_slots_is_attention_over_positions_bit_for_bit(device, dtype):
    seq_lens = [300, 41]
    caches = make_caches(seq_lens, device=device, dtype=dtype)
    indices = random_indices(seq_lens, 1, 2, 60, device=device)
    q = random_vectors(2, 1, 6, 64, dtype=dtype, device=device)
    rows = row_cache(caches, 80)
    fetched = hata.fetch_rows(indices, *caches.kv, **rows)
    block_table = torch.arange(2, dtype=torch.int32, device=device)[:, None]
    all_slots = torch.full((2,), 80, dtype=torch.int32, device=device)
    caches_of_rows = (rows["k_rows"], rows["v_rows"], block_table, all_slots)
    actual = hata.gather_attention(q, *caches_of_rows, fetched.slots)
    for a, e in zip(actual, hata.gather_attention(q, *caches.kv, indices), strict=True):
        assert_equal(a, e)


def test_what_names_no_row_gets_no_slot(device):
    caches = make_caches([40, 7], device=device)
    rows = row_cache(caches, 8)
    indices = torch.tensor([-1, 40, INT32_MAX, 39, -7, 7, 0, -(2**31)], dtype=torch.int32)
    indices = indices.to(device).expand(2, 1, 2, 8).contiguous()
    slots, _, num_missing = hata.fetch_rows(indices, *caches.kv, **rows)
    assert slots[0, 0].tolist() == [[-1, -1, -1, 0, -1, 1, 2, -1]] * 2
    assert slots[1, 0].tolist() == [[-1, -1, -1, -1, -1, -1, 0, -1]] * 2
    assert num_missing.tolist() == [[3, 3], [1, 1]]


def test_a_state_of_anything_is_no_danger(device):
    """Hints, marks and hands may hold anything; what a slot holds alone must be true."""
    caches = make_caches([40, 7], device=device)
    rows = row_cache(caches, 9)
    rows["slot_of_row"].random_(-(2**31), 2**31 - 1)
    rows["referenced"].random_(0, 255)
    rows["hand"].copy_(torch.tensor([[-3, INT32_MAX], [9, 4]]))
    indices = random_indices([40, 7], 1, 2, 8, device=device)
    slots, _, _ = hata.fetch_rows(indices, *caches.kv, **rows)
    for b, h, i in itertools.product(range(2), range(2), range(8)):
        t, slot = int(indices[b, 0, h, i]), int(slots[b, 0, h, i])
        assert (slot >= 0) == (t >= 0)
        if t >= 0:
            page = caches.block_table[b, t // 16]
            assert_equal(rows["k_rows"][b, slot, h], caches.k_cache[page, t % 16, h])


def test_opcheck(device):
    given = arguments("fetch_rows", device)
    given |= hata.fetch_rows(**given)._asdict()
    torch.library.opcheck(torch.ops.hata.fetch_rows.default, (), given)
