"""The C++ contract (csrc/*.h) against numpy, through the module that tests/internals builds."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from internal_codes import random_codes, unpack

PART_SHAPES = [  # batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len, top_k
    (1, 1, 1, 1, 8, 1, 1),
    (1, 1, 32, 8, 128, 32768, 512),
    (3, 2, 28, 4, 96, 1000, 77),
    (64, 1, 32, 8, 128, 131072, 2048),
    (1, 8, 16, 1, 256, 53, 64),
    (300, 1, 8, 8, 64, 4096, 4096),
]


# --- hash_code.h


@pytest.mark.parametrize("num_words", range(1, 9))
def test_bit_i_of_a_code_is_bit_i_mod_32_of_word_i_div_32(internals, rng, num_words):
    codes = random_codes(rng, 50, num_words)
    np.testing.assert_array_equal(internals.code_bits(codes), unpack(codes).astype(bool))


@pytest.mark.parametrize("num_words", range(1, 9))
def test_positive_projections_are_set_bits(internals, rng, num_words):
    values = rng.standard_normal(num_words * 32).astype(np.float32)
    values[:4] = [0.0, -0.0, np.nan, np.inf]
    code = internals.pack_signs(values)
    np.testing.assert_array_equal(unpack(code), values > 0)


# --- query_planes.h


@pytest.mark.parametrize("query_bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [1, 4, 7, 255])
def test_weight_sum_is_the_group_for_signs_and_the_largest_level_otherwise(
    internals, query_bits, group
):
    expected = group if query_bits == 1 else 2**query_bits - 1
    assert internals.plane_weight_sum(query_bits, group) == expected


def test_weights_are_powers_of_two_and_a_remainder_that_sum_to_weight_sum(internals):
    for weight_sum in range(1, 256):
        count = internals.num_planes(weight_sum)
        weights = [internals.plane_weight(p, weight_sum) for p in range(count)]
        assert count == weight_sum.bit_length() <= internals.MAX_PLANES
        assert weights[:-1] == [2**p for p in range(count - 1)]
        assert min(weights) > 0
        assert sum(weights) == weight_sum


def test_every_level_of_every_weight_sum_is_the_weight_of_its_planes(internals):
    for weight_sum in range(1, 256):
        count = internals.num_planes(weight_sum)
        weights = [internals.plane_weight(p, weight_sum) for p in range(count)]
        for level in range(weight_sum + 1):
            planes = internals.level_planes(level, weight_sum)
            assert planes < 2**count
            assert sum(w for p, w in enumerate(weights) if planes >> p & 1) == level


# --- selection.h


def dense_ranks(values: NDArray) -> NDArray[np.int64]:
    """The rank of each value among the distinct ones, NaN below all of them; -0 equals +0."""
    ranks = np.full(values.shape, -1)
    numbers = ~np.isnan(values)
    ranks[numbers] = np.unique(values[numbers], return_inverse=True)[1]
    return ranks


def test_float16_ranks_have_the_order_of_all_65536_values(internals):
    bits = np.arange(65536, dtype=np.uint16)
    ranks = internals.ordered_rank_float16(bits)
    np.testing.assert_array_equal(
        dense_ranks(ranks.astype(np.float64)), dense_ranks(bits.view(np.float16)) + 1
    )


def test_float32_ranks_have_the_order_of_float32(internals, rng):
    tiny = np.finfo(np.float32).smallest_subnormal
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, tiny, -tiny, 1, -1], np.float32)
    values = np.concatenate([special, -np.abs(special), random_codes(rng, 20000).view(np.float32)])
    ranks = internals.ordered_rank_float32(values.view(np.uint32))
    np.testing.assert_array_equal(dense_ranks(ranks.astype(np.float64)), dense_ranks(values) + 1)


def test_int32_ranks_have_the_order_of_int32(internals, rng):
    values = np.concatenate([random_codes(rng, 1000).view(np.int32), [-(2**31), -1, 0, 2**31 - 1]])
    ranks = internals.ordered_rank_int32(values)
    np.testing.assert_array_equal(np.argsort(ranks), np.argsort(values))


def test_sink_and_recent_positions_are_always_selected(internals):
    positions = np.arange(20)
    selected = internals.always_selected(positions, 20, 3, 5)
    np.testing.assert_array_equal(np.flatnonzero(selected), [0, 1, 2, 15, 16, 17, 18, 19])
    assert internals.always_selected(positions[:4], 4, 3, 5).all()
    assert not internals.always_selected(positions, 20, 0, 0).any()


# --- paged_cache.h, cache_append.h


@pytest.mark.parametrize("shift", [0, 1, 4, 7])
def test_a_position_lies_in_its_page_and_row(internals, rng, shift):
    page_size = 2**shift
    block_table = rng.permutation(3 * 5).reshape(3, 5).astype(np.int32)
    table = internals.PageTable(
        block_table,
        np.zeros(3, np.int32),
        num_pages=15,
        page_size=page_size,
        page_shift=shift,
        page_mask=page_size - 1,
    )
    for b, t in itertools.product(range(3), range(5 * page_size)):
        assert table.page_of(b, t) == block_table[b, t // page_size]
        assert table.row_of(t) == t % page_size


def one_page_table(internals, cache_seqlens, pages, page_size=53):
    return internals.PageTable(
        np.array(pages, np.int32)[:, None],
        np.array(cache_seqlens, np.int32),
        num_pages=4,
        page_size=page_size,
        page_shift=31,
        page_mask=2**31 - 1,
    )


def test_one_page_per_sequence_has_any_size(internals):
    table = one_page_table(internals, [0, 0], [2, 0])
    assert [table.page_of(b, t) for b in (0, 1) for t in (0, 52)] == [2, 2, 0, 0]
    assert [table.row_of(t) for t in (0, 52)] == [0, 52]


def test_a_page_that_does_not_exist_is_none(internals):
    table = one_page_table(internals, [0] * 4, [-1, 4, 2**31 - 1, 3])
    assert [table.page_of(b, 0) for b in range(4)] == [-1, -1, -1, 3]


def test_seq_len_stays_within_the_capacity(internals):
    table = one_page_table(internals, [-7, 0, 53, 54], [0, 1, 2, 3])
    assert [table.seq_len_of(b) for b in range(4)] == [0, 0, 53, 53]


def test_a_query_token_sees_itself_and_what_came_before(internals):
    assert [internals.visible_len(10, 3, j) for j in range(3)] == [8, 9, 10]
    assert [internals.visible_len(2, 4, j) for j in range(4)] == [0, 0, 1, 2]  # left padding
    assert internals.visible_len(0, 1, 0) == 0


def test_the_last_tokens_are_appended_where_they_fit(internals):
    table = one_page_table(internals, [5, 2, 55, 53], [0, 1, 2, 3])

    def positions(new_seqlens, b):
        return [table.append_position(new_seqlens, 4, b, j) for j in range(4)]

    assert positions(None, 0) == [1, 2, 3, 4]
    assert positions(None, 1) == [-1, -1, 0, 1]  # left padding
    assert positions(None, 2) == [51, 52, -1, -1]  # past the capacity
    new_seqlens = np.array([2, 4, 0, 1], np.int32)
    assert positions(new_seqlens, 0) == [-1, -1, 3, 4]
    assert positions(new_seqlens, 1) == [-1, -1, 0, 1]
    assert positions(new_seqlens, 2) == [-1, -1, -1, -1]
    assert positions(new_seqlens, 3) == [-1, -1, -1, 52]


# --- attention.h, dense_attention.h, workspace.h


def test_splits_fill_the_gpu_with_enough_rows_each(internals):
    top_ks = [0, 1, 63, 64, 65, 512, 2048, 100_000]
    for pairs in range(0, 600, 7):
        splits = [internals.attention_num_splits(pairs, top_k) for top_k in top_ks]
        assert splits == sorted(splits)
        for count, top_k in zip(splits, top_ks, strict=True):
            assert 1 <= count <= internals.MAX_SPLITS
            # With one split fewer, one would hold more rows than a split must have, and the blocks
            # would not fill the GPU.
            assert count == 1 or (count - 1) * internals.MIN_ROWS_PER_SPLIT < top_k
            assert count == 1 or (count - 1) * pairs < internals.TARGET_BLOCKS
        most = splits[-1]  # with rows enough: one split more would be too many
        too_many = most == internals.MAX_SPLITS or (most + 1) * pairs > internals.TARGET_BLOCKS
        assert pairs == 0 or too_many


def test_splits_share_a_sequence_whatever_its_capacity(internals):
    piece = internals.MIN_ROWS_PER_SPLIT
    for seq_len in (0, 1, 63, 64, 65, 1000, 8192, 2**20, 2**31 - 8):
        for lists in (1, 8, 64, 300):
            shares = {
                internals.split_sequence(seq_len, internals.attention_num_splits(lists, capacity))
                for capacity in (seq_len, 2 * seq_len + 1, 2**31 - 8)
                if capacity >= seq_len
            }
            ((pieces, used),) = shares
            assert 1 <= used <= internals.attention_num_splits(lists, seq_len)
            assert used * pieces * piece >= seq_len
            assert used == 1 or (used - 1) * pieces * piece < seq_len


@pytest.mark.parametrize("shape", PART_SHAPES)
def test_workspace_parts_are_aligned_and_do_not_overlap(internals, shape):
    batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len, top_k = shape
    pairs, rows = batch * q_len * num_kv_heads, batch * q_len * num_heads
    splits = internals.attention_num_splits(pairs, top_k)
    sizes = {
        "planes": pairs * internals.MAX_PLANES * internals.MAX_WORDS * 4,
        "ranks": pairs * max_seq_len * 2,
        "out_partial": splits * rows * head_dim * 4,
        "lse_partial": splits * rows * 4,
    }
    layout = internals.workspace_layout(*shape)
    assert all(offset % internals.WORKSPACE_ALIGNMENT == 0 for offset in layout.values())
    ends = [layout[part] + size for part, size in sizes.items()]
    starts = [*(layout[part] for part in list(sizes)[1:]), layout["size"]]
    assert layout["planes"] == 0
    assert all(end <= start for end, start in zip(ends, starts, strict=True))


@pytest.mark.parametrize("shape", PART_SHAPES)
@pytest.mark.parametrize("grown", [2, 4, 5, 6])  # num_heads, head_dim, max_seq_len, top_k
def test_workspace_grows_with_its_shape(internals, shape, grown):
    larger = list(shape)
    larger[grown] *= 2
    assert internals.workspace_layout(*larger)["size"] >= internals.workspace_layout(*shape)["size"]
