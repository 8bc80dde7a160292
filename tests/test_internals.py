"""Pieces of C++ against numpy, through the test-only module hata_internals."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def internals() -> ModuleType:
    folder = Path(__file__).parent / "internals"
    built = sorted(folder.glob("hata_internals*.so"))
    if not built:
        pytest.fail("hata_internals is not built: make build-tests (CMake's HATA_BUILD_TESTS=ON)")
    spec = importlib.util.spec_from_file_location("hata_internals", built[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def random_words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def test_bits_are_lowest_first(internals, rng):
    codes = random_words(rng, 5, 8)
    expected = np.unpackbits(codes.view(np.uint8), axis=1, bitorder="little").astype(bool)
    np.testing.assert_array_equal(internals.code_bits(codes), expected)


def test_signs_pack_to_the_same_bits(internals, rng):
    values = rng.standard_normal(96).astype(np.float32)
    values[:3] = [0.0, -0.0, np.nan]  # none of them is above zero
    words = internals.pack_signs(values)
    np.testing.assert_array_equal(internals.code_bits(words[None])[0], values > 0)


@pytest.mark.parametrize("weight_sum", range(1, 256))
def test_every_level_has_planes_that_add_up_to_it(internals, weight_sum):
    planes = internals.num_planes(weight_sum)
    weights = [internals.plane_weight(p, weight_sum) for p in range(planes)]
    assert planes <= internals.MAX_PLANES
    assert sum(weights) == weight_sum
    for level in range(weight_sum + 1):
        bits = internals.level_planes(level, weight_sum)
        assert sum(w for p, w in enumerate(weights) if bits >> p & 1) == level


def test_weight_sums(internals):
    assert [internals.plane_weight_sum(1, g) for g in (1, 4, 7)] == [1, 4, 7]
    assert [internals.plane_weight_sum(b, 4) for b in (2, 3, 4)] == [3, 7, 15]


def test_float16_keys_are_in_the_order_of_the_numbers(internals):
    bits = np.arange(65536, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float64)
    keys = internals.ordered_key_float16(bits).astype(np.int64)
    nan = np.isnan(values)
    assert (keys[nan] == 0).all()
    assert (keys[~nan] > 0).all()
    order = np.argsort(values[~nan], kind="stable")
    steps = np.diff(values[~nan][order])
    np.testing.assert_array_equal(
        np.sign(np.diff(keys[~nan][order])), np.sign(np.nan_to_num(steps))
    )


def test_32_bit_keys_are_in_the_order_of_the_numbers(internals, rng):
    floats = np.array([-np.inf, -1.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, np.inf], np.float32)
    keys = internals.ordered_key_float32(floats.view(np.uint32)).astype(np.int64)
    assert keys[3] == keys[4]
    assert (np.diff(np.delete(keys, 3)) > 0).all()
    assert internals.ordered_key_float32(np.array([np.nan], np.float32).view(np.uint32))[0] == 0
    ints = np.sort(rng.integers(-(2**31), 2**31, 100)).astype(np.int32)
    assert (np.diff(internals.ordered_key_int32(ints).astype(np.int64)) >= 0).all()


def test_splits_fill_the_gpu_and_stay_useful(internals):
    for pairs in (1, 8, 64, 264, 10_000):
        for top_k in (1, 64, 65, 512, 4096):
            splits = internals.gather_num_splits(pairs, top_k)
            assert 1 <= splits <= internals.MAX_SPLITS
            assert splits == 1 or (splits - 1) * internals.MIN_ROWS_PER_SPLIT < top_k
            assert splits == 1 or pairs * (splits - 1) < internals.TARGET_BLOCKS


@pytest.mark.parametrize("shape", [(1, 1, 32, 8, 128, 32768, 512), (3, 4, 5, 5, 96, 1001, 7)])
def test_parts_of_the_workspace_do_not_overlap(internals, shape):
    batch, q_len, num_heads, num_kv_heads, head_dim, max_seq_len, top_k = shape
    layout = internals.workspace_layout(*shape)
    pairs, rows = batch * q_len * num_kv_heads, batch * q_len * num_heads
    splits = internals.gather_num_splits(pairs, top_k)
    sizes = {
        "planes": pairs * internals.MAX_PLANES * internals.MAX_WORDS * 4,
        "keys": pairs * max_seq_len * 2,
        "out_partial": splits * rows * head_dim * 4,
        "lse_partial": splits * rows * 4,
    }
    end = 0
    for part, size in sizes.items():
        assert layout[part] % internals.WORKSPACE_ALIGNMENT == 0
        assert layout[part] >= end
        end = layout[part] + size
    assert layout["size"] >= end


def test_positions_of_pages(internals):
    block_table = np.array([[2, 0, 9], [1, 3, -1]], np.int32)
    seqlens = np.array([40, -5], np.int32)
    table = internals.PageTable(
        block_table, seqlens, num_pages=4, page_size=16, page_shift=4, page_mask=15
    )
    assert [table.page_of(0, t) for t in (0, 15, 16, 32)] == [2, 2, 0, -1]
    assert [table.page_of(1, t) for t in (0, 16, 32)] == [1, 3, -1]
    assert [table.row_of(t) for t in (0, 15, 16, 33)] == [0, 15, 0, 1]
    assert [table.seq_len_of(b) for b in (0, 1)] == [40, 0]
    assert [table.append_position(None, 4, 0, j) for j in range(4)] == [36, 37, 38, 39]
    new = np.array([1, 0], np.int32)
    assert [table.append_position(new, 4, 0, j) for j in range(4)] == [-1, -1, -1, 39]
    assert [internals.visible_len(3, 4, j) for j in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("num_words", WIDTHS)
def test_every_instruction_set_counts_the_same_matches(internals, rng, num_words):
    codes = random_words(rng, 77, num_words)
    weight_sum = 15
    planes = random_words(rng, internals.num_planes(weight_sum), num_words)
    equal = internals.code_bits(codes)[:, None] == internals.code_bits(planes)[None]
    weights = [internals.plane_weight(p, weight_sum) for p in range(len(planes))]
    expected = (equal.sum(2) * weights).sum(1)
    for isa in internals.supported_isas():
        np.testing.assert_array_equal(
            internals.count_matches(isa, codes, planes, weight_sum), expected, err_msg=isa
        )


def test_every_instruction_set_selects_the_same_row(internals, rng):
    keys = rng.integers(0, 40, 1000).astype(np.uint16)  # many ties
    top_k, num_sink, num_recent = 100, 3, 5
    middle = np.arange(num_sink, len(keys) - num_recent)
    best = middle[np.lexsort((-middle, -keys[middle].astype(int)))]
    chosen = best[: top_k - num_sink - num_recent]
    ends = [*range(num_sink), *range(len(keys) - num_recent, len(keys))]
    expected = np.sort(np.concatenate([chosen, ends]))
    for isa in internals.supported_isas():
        for select, dtype in (
            (internals.select_row16, np.uint16),
            (internals.select_row32, np.uint32),
        ):
            indices, count = select(isa, keys.astype(dtype), top_k, num_sink, num_recent)
            assert count == top_k
            np.testing.assert_array_equal(indices, expected, err_msg=isa)
