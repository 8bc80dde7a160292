"""The best pairs of num_bits and top_k for the bytes that a step reads."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from capture_cases import HEAD_DIM, NUM_LAYERS, SEQ_LEN, SHAPE, make_captures
from hata import HashWeights, HataConfig
from hata.recall.frontier import Frontier
from hata.recall.measure import Measurement, Results
from hata.selectors import ExactSelector, HataSelector
from hata.selectors.quality import Quality

BUDGETS = (20, 40, 80)
DENSE = 1


def measurement(num_bits: int, mass: torch.Tensor, query_bits: int = 4) -> Measurement:
    """Invented masses, ``[num_layers, num_budgets]``, the same for every head."""
    selector = HataSelector(HashWeights.random(**SHAPE, num_bits=num_bits, query_bits=query_bits))
    heads = [row.expand(2, -1).double() for row in mass]
    return Measurement(selector, tuple(Quality(row, row, None) for row in heads))


@pytest.fixture
def frontier(tmp_path: Path) -> Frontier:
    info = make_captures(tmp_path / "captures", num_sequences=1).info
    grown = torch.rand(2, NUM_LAYERS, len(BUDGETS)).cumsum(-1) / 10
    found = [measurement(32, grown[0]), measurement(64, grown[0] + grown[1] / 4)]
    return Frontier(Results(info, found, BUDGETS, DENSE))


def test_bytes_are_codes_and_selected_rows(frontier: Frontier) -> None:
    bytes_of = {(pair.num_bits, pair.top_k): pair.bytes_per_step for pair in frontier.pairs}
    assert len(bytes_of) == 6
    assert bytes_of[64, 40] == SEQ_LEN * 8 + 40 * 2 * HEAD_DIM * 2


def test_no_cheaper_pair_beats_one_of_the_frontier(frontier: Frontier) -> None:
    best = frontier.uniform()
    for a, b in itertools.pairwise(best):
        assert a.bytes_per_step < b.bytes_per_step
        assert a.attention_mass < b.attention_mass
    for pair in frontier.pairs:
        found = frontier.everywhere(pair)
        assert any(
            x.bytes_per_step <= found.bytes_per_step and x.attention_mass >= found.attention_mass
            for x in best
        )
        assert frontier.mass_of(found) == pytest.approx(found.attention_mass)


def test_layers_of_their_own_are_better_at_no_more_bytes(frontier: Frontier) -> None:
    for uniform in frontier.uniform():
        layers = frontier.per_layer(uniform.bytes_per_step)
        assert len(layers.pairs) == NUM_LAYERS - DENSE
        assert layers.bytes_per_step <= uniform.bytes_per_step
        assert frontier.mass_of(layers) == pytest.approx(layers.attention_mass)
        settings = layers.settings(range(DENSE, NUM_LAYERS), NUM_LAYERS)
        config = HataConfig(top_k=settings["top_k"])
        assert settings["num_bits"][DENSE:] == [x.num_bits for x in layers.pairs]
        assert config.layer_top_k(NUM_LAYERS)[DENSE:] == tuple(x.top_k for x in layers.pairs)


def test_the_best_layers_are_chosen_where_gains_shrink(tmp_path: Path) -> None:
    """With concave gains the greedy choice is the best of all."""
    info = make_captures(tmp_path / "captures", num_sequences=1).info
    steps = torch.rand(NUM_LAYERS, len(BUDGETS)).sort(-1, descending=True).values
    found = [measurement(32, steps.cumsum(-1) / 4)]
    frontier = Frontier(Results(info, found, BUDGETS, DENSE))
    cheap, middle, dear = frontier.pairs
    # Bytes for one layer to go from the cheapest to the second, or for both.
    for level in (cheap, middle):
        limit = (cheap.bytes_per_step + level.bytes_per_step) / 2
        allocation = frontier.per_layer(limit)
        options = itertools.product((cheap, middle, dear), repeat=2)
        masses = []
        for pairs in options:
            each = dataclasses.replace(allocation, pairs=pairs)
            if each.bytes_per_step <= limit:
                masses.append(frontier.mass_of(each))
        assert allocation.attention_mass == pytest.approx(max(masses))


def test_rejects_what_one_config_cannot_hold(tmp_path: Path) -> None:
    info = make_captures(tmp_path / "captures", num_sequences=1).info
    mass = torch.rand(NUM_LAYERS, len(BUDGETS))
    rule = "--weights must differ in num_bits and have query_bits and key_norms alike"
    for other in (measurement(32, mass), measurement(64, mass, query_bits=1)):
        with pytest.raises(ValueError, match=rule):
            Frontier(Results(info, [measurement(32, mass), other], BUDGETS, DENSE))
    exact = Measurement(ExactSelector(), measurement(32, mass).layers)
    with pytest.raises(ValueError, match="--frontier must compare hash weights alone, got exact"):
        Frontier(Results(info, [exact], BUDGETS, DENSE))
