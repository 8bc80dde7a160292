"""Recipe `hata`: its teacher and gradients are the documented ones, whatever the data."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hata.training.data import turned
from hata.training.recipes.fit import generator_of
from hata.training.recipes.hata import HataRecipe
from training_data import dense_attention, make_data, trained


@pytest.mark.parametrize("logits", [{}, {"softcap": 3.0, "sinks": True}])
def test_the_teacher_is_the_dense_attention_without_what_is_always_selected(logits):
    data = make_data(num_layers=1, **logits)
    fit = HataRecipe(num_bits=32).fit(data)
    rows, keys = torch.tensor([0, 7, 31]), torch.tensor([0, 1, 2, 50, 99, 120, 150, 199])
    p, contested = fit._teacher(data, 1, rows, keys.expand(data.heads, -1))
    for i, row in enumerate(rows.tolist()):
        position = int(data.positions[1, row])
        whole = dense_attention(data, 1, row, position)
        open_ = (keys >= data.num_sink) & (keys <= position - data.num_recent)
        assert torch.equal(contested[:, i], open_.expand(data.heads, -1))
        torch.testing.assert_close(p[:, i], whole[:, keys] * open_, rtol=1e-4, atol=1e-7)


def test_keys_after_a_query_may_outweigh_all_that_it_sees():
    # Logits of thousands, as layer 0 of Qwen2.5 has: for queries before position 150 the drawn keys
    # after it lie hundreds above the logsumexp, and exp of that is infinite in float32.
    data = make_data(num_layers=1)
    far = torch.where(torch.arange(data.seq_len) >= 150, 200.0, 1.0)
    data = replace(data, k=data.k * far[:, None])
    recipe = HataRecipe(num_bits=32, num_steps=8, num_queries=40)
    fit = recipe.fit(data)
    p, _ = fit._teacher(data, 0, torch.arange(40), torch.arange(data.seq_len).expand(2, -1))
    early = data.positions[0] < 150
    for row in early.nonzero()[:, 0].tolist():
        position = int(data.positions[0, row])
        wanted = dense_attention(data, 0, row, position)
        wanted[:, : data.num_sink] = 0
        wanted[:, position - data.num_recent + 1 :] = 0
        torch.testing.assert_close(p[:, row], wanted, rtol=1e-4, atol=1e-7)
    for weights in trained(recipe, data):
        assert bool(weights.isfinite().all())


def test_the_mass_gradient_is_that_of_the_softly_selected_mass():
    # With its cut moved so that the number of selected keys stays, and a width that moves with the
    # scores' spread, as the derivation has it. Each key stands for as many as its count says.
    fit = HataRecipe(num_bits=32).fit(make_data(num_layers=1))
    contested = torch.arange(60) >= 4
    scores = torch.randn(1, 1, 60, dtype=torch.float64)
    shown = scores.masked_fill(~contested, -1e30)
    p = torch.rand(1, 1, 60, dtype=torch.float64) * contested
    counts = 1 + 4 * torch.rand(1, 1, 60, dtype=torch.float64)
    weights = counts * contested
    best = shown.argsort(-1, descending=True)
    at = int((weights.gather(-1, best).cumsum(-1) < 0.1 * weights.sum()).sum())
    cut = shown.sort(-1, descending=True).values[..., at]

    def width_of(x: Tensor) -> Tensor:
        mean = (weights * x).sum() / weights.sum()
        return fit.recipe.width * ((weights * (x - mean) ** 2).sum() / weights.sum()).sqrt()

    width = width_of(scores)
    count = (weights * torch.sigmoid((shown - cut) / width)).sum()

    def mass(x: Tensor) -> Tensor:
        width = width_of(x)
        x = x.masked_fill(~contested, -1e30)
        low, high = scores.min() - 10 * width, scores.max() + 10 * width
        for _ in range(100):  # bisection for the cut that keeps the count
            middle = (low + high) / 2
            more = (weights * torch.sigmoid((x - middle) / width)).sum() > count
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return (weights * p * torch.sigmoid((x - low) / width)).sum()

    got = fit._mass_gradient(shown, scores, p, contested[None, None], counts, 0.1)
    wanted = torch.zeros(60, dtype=torch.float64)
    for t in range(60):
        nudge = torch.zeros_like(scores)
        nudge[..., t] = 1e-5
        wanted[t] = -(mass(scores + nudge) - mass(scores - nudge)) / 2e-5
    scaled = got[0, 0] / (4 * width)
    torch.testing.assert_close(scaled, wanted, rtol=1e-4, atol=1e-6)  # central differences
    torch.testing.assert_close((got * scores).sum().item(), 0.0, rtol=0, atol=1e-12)


def test_the_keys_of_a_step_stand_for_all_keys_and_are_the_attended_ones_more_often():
    data = make_data(num_layers=1, num_sequences=1)
    fit = HataRecipe(num_bits=32, num_keys=48).fit(data)
    positions = data.positions[0].tolist()
    attention = sum(dense_attention(data, 0, row, at) for row, at in enumerate(positions))
    sums, times, num_steps = torch.zeros(2, 200), torch.zeros(2, 200), 1000
    for step in range(num_steps):
        _, _, keys, counts = fit._draw(data, generator_of(1, step))
        assert bool((keys.diff(dim=-1) > 0).all())  # none twice
        sums.scatter_add_(1, keys, counts[:, 0])
        times.scatter_add_(1, keys, torch.ones(2, 48))
    # A key drawn with probability 48 / 200 / 2 at least stands for at most 8.4 keys.
    torch.testing.assert_close(sums / num_steps, torch.ones(2, 200), rtol=0, atol=0.4)
    order = attention.argsort(-1, descending=True)
    share = times.gather(-1, order) / num_steps
    assert bool((share[:, :20].mean(-1) > 1.5 * share[:, -100:].mean(-1)).all())
    everything = HataRecipe(num_bits=32, num_keys=300).fit(data)._draw(data, generator_of(1, 0))
    assert torch.equal(everything[2], torch.arange(200).expand(2, -1))
    assert torch.equal(everything[3], torch.ones(2, 1, 200))


def test_a_turned_step_sees_the_queries_and_keys_of_other_positions():
    angles = torch.linspace(2.0, 0.01, 16, dtype=torch.float64)
    data = replace(make_data(num_layers=1), rotary=angles)
    later = replace(data, q=turned(data.q, angles, -7), k=turned(data.k, angles, -7))
    fit = HataRecipe(num_bits=32).fit(data)
    where = (1, torch.arange(40), torch.arange(200).expand(2, -1))
    for found, wanted in zip(fit._teacher(later, *where), fit._teacher(data, *where), strict=True):
        torch.testing.assert_close(found, wanted)  # products stay
    here = fit._logits(data, *where, 1.0)
    there = fit._logits(data, *where, 1.0, turn=-7)
    assert (here - there).std() > 0.1 * here.std()
    torch.testing.assert_close(there, fit._logits(later, *where, 1.0))


def test_queries_that_see_few_keys_do_no_harm():
    # 40 of 200 keys are drawn, so that the first query tokens see fewer than a budget selects.
    data = make_data(num_layers=1)
    positions = torch.arange(40).expand(2, -1)
    early = replace(data, positions=positions)
    recipe = HataRecipe(num_bits=32, num_steps=8, num_keys=40, budget_first=0.3, budget_last=0.9)
    for weights in trained(recipe, early):
        assert bool(weights.isfinite().all())


def test_keys_of_equal_codes_do_no_harm():
    # Keys so far from zero that a code tells none from another: every score is the same.
    data = make_data(num_layers=1)
    data = replace(data, k=data.k + 1e4)
    recipe = HataRecipe(num_bits=32, num_steps=8, num_queries=16, num_keys=64)
    for weights in trained(recipe, data):
        assert bool(weights.isfinite().all())


def test_recipe_hata_refuses_norms():
    with pytest.raises(ValueError, match=r"hata\.train: key_norms must be False"):
        HataRecipe(key_norms=True)
