"""The CPU loops of every instruction set against numpy, through the module of tests/internals."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from internal_codes import random_codes, unpack

# --- cpu/dtype.h


def test_float16_bits_convert_like_numpy(internals):
    bits = np.arange(65536, dtype=np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(internals.float16_to_float(bits), expected)
    for isa in internals.supported_isas():
        np.testing.assert_array_equal(internals.to_float(isa, bits), expected)
        np.testing.assert_array_equal(internals.to_float(isa, bits[:21]), expected[:21])


def float32_near_ties() -> NDArray[np.float32]:
    """Float32 values at, just below and just above each float16 and each midpoint of two."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    exact = np.concatenate([halves, (halves[:-1] + halves[1:]) / 2, [65520, np.inf, 1e30, 1e-30]])
    exact = exact.astype(np.float32)
    near = [exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))]
    return np.concatenate([*near, *(-values for values in near)])


def test_float16_rounds_to_nearest_even_like_numpy(internals):
    values = float32_near_ties()
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(internals.float_to_float16(values), expected.view(np.uint16))
    nan_bits = internals.float_to_float16(np.array([np.nan, -np.nan], np.float32))
    assert np.isnan(nan_bits.view(np.float16)).all()


def test_bfloat16_rounds_to_nearest_even(internals, rng):
    bits = random_codes(rng, 20000)
    bits[:4] = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF]  # two ties, above one, overflow
    values = bits.view(np.float32)
    numbers = ~np.isnan(values)
    rounded = internals.float_to_bfloat16(values)
    kept, dropped = bits >> 16, bits & 0xFFFF
    up = (dropped > 0x8000) | ((dropped == 0x8000) & (kept & 1 == 1))
    np.testing.assert_array_equal(rounded[numbers], (kept + up)[numbers])
    assert np.isnan(internals.bfloat16_to_float(rounded[~numbers])).all()
    np.testing.assert_array_equal(
        internals.bfloat16_to_float(rounded).view(np.uint32), rounded.astype(np.uint32) << 16
    )


# --- the loops of every instruction set


def test_every_isa_reads_every_float8(internals):
    bits = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()
    for isa in internals.supported_isas():
        for n in (256, 21):
            values = internals.float8_row(isa, bits[:n])
            np.testing.assert_array_equal(values, expected[:n], err_msg=isa)


@pytest.mark.parametrize("num_words", range(1, 9))
@pytest.mark.parametrize("weight_sum", [1, 4, 7, 15, 31, 255])
def test_every_isa_counts_the_weighted_matches(internals, rng, num_words, weight_sum):
    num_planes = internals.num_planes(weight_sum)
    codes = random_codes(rng, 333, num_words)
    planes = random_codes(rng, num_planes, num_words)
    codes[0], codes[1] = planes[0], ~planes[0]
    equal = unpack(codes)[:, None] == unpack(planes)
    weights = [internals.plane_weight(p, weight_sum) for p in range(num_planes)]
    expected = equal.sum(-1) @ np.array(weights)
    for isa in internals.supported_isas():
        for n in (333, 64, 17, 1):
            matches = internals.count_matches(isa, codes[:n], planes, weight_sum)
            np.testing.assert_array_equal(matches, expected[:n], err_msg=f"{isa}, {n} codes")


def test_every_isa_counts_the_extremes(internals):
    planes = np.full((8, 8), 2**32 - 1, np.uint32)
    codes = np.repeat(np.array([[2**32 - 1], [0]], np.uint32), 8, axis=1)[[0, 1] * 40]
    expected = np.array([255 * 256, 0] * 40)
    for isa in internals.supported_isas():
        np.testing.assert_array_equal(internals.count_matches(isa, codes, planes, 255), expected)


@pytest.mark.parametrize(("num_words", "weight_sum"), [(2, 15), (3, 7), (8, 255)])
def test_every_isa_rounds_the_score_with_norm_once(internals, rng, num_words, weight_sum):
    planes = np.zeros((internals.num_planes(weight_sum), num_words), np.uint32)
    num_bits = num_words * 32
    matches = rng.integers(0, weight_sum * num_bits + 1, 2001).astype(np.uint16)
    norms = rng.integers(0, 0x7C00, 2001).astype(np.uint16)  # every finite norm
    scores = 2 * matches.astype(np.int32) - weight_sum * num_bits
    with np.errstate(over="ignore"):
        expected = scores.astype(np.float32) / np.float32(num_bits)
        expected = (expected * norms.view(np.float16).astype(np.float32)).astype(np.float16)
    for isa in internals.supported_isas():
        bits = internals.apply_norms(isa, matches, norms, planes, weight_sum)
        np.testing.assert_array_equal(bits, expected.view(np.uint16), err_msg=isa)


def test_a_projection_does_not_depend_on_the_rows_beside_it(internals, rng):
    rows = rng.standard_normal((23, 72)).astype(np.float32)
    weights = rng.standard_normal((72, 96)).astype(np.float32)
    for isa in internals.supported_isas():
        together = internals.project(isa, rows, weights)
        alone = np.concatenate([internals.project(isa, row[None], weights) for row in rows])
        np.testing.assert_array_equal(together, alone, err_msg=isa)
        # A chain of head_dim float32 additions: error below head_dim eps sum |x w|.
        exact = rows.astype(np.float64) @ weights
        bound = 72 * np.finfo(np.float32).eps * (np.abs(rows) @ np.abs(weights))
        assert (np.abs(together - exact) <= bound).all()


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("num_values", [1, 3, 700, 2**16])
@pytest.mark.parametrize(
    ("top_k", "num_sink", "num_recent"), [(64, 0, 0), (65, 4, 16), (20, 4, 16)]
)
def test_every_isa_selects_the_same_rows(
    internals, rng, bits, num_values, top_k, num_sink, num_recent
):
    visible = 3001
    # Few values make ties; many, multiplied, use the whole width of the rank.
    ranks = rng.integers(0, num_values, visible) * (2 ** (bits - 16)) + rng.integers(0, 2, visible)
    ranks = ranks.astype(np.uint16 if bits == 16 else np.uint32)
    positions = np.arange(visible)
    forced = internals.always_selected(positions, visible, num_sink, num_recent)
    best = np.lexsort((-positions, -ranks.astype(np.int64), ~forced))[:top_k]
    taken = ranks[best[~forced[best]]]  # none where the forced ones fill the budget
    last = taken.min() if len(taken) > 0 else 0
    ties = (ranks[~forced] == last).sum() if len(taken) > 0 else 0
    for isa in internals.supported_isas():
        select = internals.select_row16 if bits == 16 else internals.select_row32
        indices, last_rank, num_ties = select(isa, ranks, top_k, num_sink, num_recent)
        np.testing.assert_array_equal(indices, np.sort(best), err_msg=isa)
        assert (last_rank, num_ties) == (last, ties)


def test_every_isa_selects_all_of_a_short_row(internals):
    ranks = np.arange(5, dtype=np.uint16)
    for isa in internals.supported_isas():
        indices, _, num_ties = internals.select_row16(isa, ranks, 8, 1, 2)
        np.testing.assert_array_equal(indices, [0, 1, 2, 3, 4, -1, -1, -1])
        assert num_ties == 0


def test_an_isa_that_the_cpu_does_not_have_is_an_error_that_names_those_it_has(internals):
    script = "import torch, hata; hata.hash_encode(torch.ones(1, 1, 1, 8), torch.ones(1, 8, 32))"
    environment = {**os.environ, "HATA_CPU_ISA": "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    names = ", ".join(internals.supported_isas())
    assert done.returncode != 0
    assert f"HATA_CPU_ISA must be one of {names} on this CPU, got sse9" in done.stderr
