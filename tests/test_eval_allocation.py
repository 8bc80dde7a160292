"""Budgets of each layer's own in `hata eval`: what layers cost, and how rows are shared out."""

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch

import hata.cli
from hata import HashWeights, HataConfig
from hata.eval.allocation import LayerLosses, layer_losses
from hata.eval.decode import SparseDecoder
from hata.eval.setting import Setting
from hata.eval.tasks import Sample
from hata.integrations.model_shape import model_shape
from hata.selectors import HataSelector
from tiny_folder import NUM_LAYERS, save_tiny_llama
from tiny_models import make_model, random_prompt

BUDGETS = (30, 60, 120)


def power_law(weights: torch.Tensor, exponent: float) -> LayerLosses:
    falling = torch.tensor(BUDGETS, dtype=torch.float64) ** -exponent
    return LayerLosses(BUDGETS, weights.double()[:, None] * falling)


@pytest.mark.parametrize("least", [0.05, 1.0], ids=["limited", "free"])
@pytest.mark.parametrize("exponent", [0.5, 1.5])
def test_no_row_is_worth_more_in_another_layer(exponent, least):
    """The optimum, which free and without rounding is proportional to a power of the weights."""
    weights = torch.rand(9) + least
    weights[:2] = torch.tensor([least, least + 1])
    losses = power_law(weights, exponent)
    assert losses.exponent() == pytest.approx(exponent)
    torch.testing.assert_close(losses.weights().float(), weights / weights.mean())
    chosen = losses.share_out(100, 20)
    assert sum(chosen) == 900

    def total(budgets: list[int]) -> float:
        return sum(w * k**-exponent for w, k in zip(weights.tolist(), budgets, strict=True))

    at_the_limit = {i for i, k in enumerate(chosen) if k == 60}
    assert bool(at_the_limit) == (least < 1)
    for giving, taking in itertools.permutations(range(9), 2):
        if giving in at_the_limit:
            continue
        other = list(chosen)
        other[giving] -= 1
        other[taking] += 1
        assert total(chosen) <= total(other) * (1 + 1e-7)
    share = weights.double() ** (1 / (1 + exponent))
    above = [i for i in range(9) if i not in at_the_limit]
    expected = (900 - 60 * len(at_the_limit)) * share[above] / share[above].sum()
    assert [chosen[i] for i in above] == pytest.approx(expected.tolist(), abs=1.0)


def test_budgets_have_bounds():
    """Half of what is chosen, and four times the mean; where nothing is lost all are alike."""
    uneven = torch.tensor([1e6, *[1.0] * 5, *[1e-9] * 4, 0.0])
    losses = power_law(uneven, 0.1)
    assert losses.share_out(100, 20) == [400, *[80] * 5, *[60] * 5]
    assert losses.share_out(100, 99) == [100] * 11
    alike = power_law(torch.ones(3), 1.0)
    assert alike.share_out(100, 20) == [100] * 3
    assert alike.share_out(20, 20) == [20] * 3
    rising = LayerLosses(BUDGETS, torch.tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 2.0]]).double())
    assert rising.exponent() == 0.0
    only = LayerLosses(BUDGETS, torch.tensor([[1.0, 0.5, 0.25], [0.0, 0.0, 0.0]]).double())
    assert only.share_out(100, 20) == [140, 60]
    unheard = LayerLosses(BUDGETS, torch.tensor([[-1e-12] * 3, [0.0] * 3]).double())
    assert unheard.share_out(100, 20) == [100, 100]


def test_a_budget_is_judged_by_what_was_measured_near_it():
    losses = power_law(torch.rand(4) + 0.2, 1.0)
    assert losses.near(61).budgets == BUDGETS
    near = losses.near(120)
    assert near.budgets == (60, 120)
    assert torch.equal(near.kl, losses.kl[:, 1:])


def test_a_layers_loss_is_that_of_the_layer_alone(device):
    """A layer whose attention is not heard costs nothing."""
    model = make_model("llama-group4", device)
    num_layers = model_shape(model)["num_layers"]
    silent = num_layers - 1
    with torch.no_grad():
        model.model.layers[silent].self_attn.o_proj.weight.zero_()
    selector = HataSelector(HashWeights.random(**model_shape(model), num_bits=64))
    samples = [Sample(x[:70], x[70:], ()) for x in random_prompt(2, 79, device).tolist()]
    decoder, setting = SparseDecoder(model), Setting(selector, 0, 0, 2, 4)
    layers = range(1, num_layers)
    losses = layer_losses(decoder, samples, setting, layers, (10, 79))
    assert float(losses.kl[-1].max()) == pytest.approx(0.0, abs=1e-6)
    assert float(losses.kl[:, 1].max()) == pytest.approx(0.0, abs=1e-5)  # a budget of everything
    expected = []
    for sample in samples:  # layers after it have a budget of everything, those before are dense
        decoder.read(sample.prompt_ids)
        dense, sparse = (
            decoder.decode(sample.decoded_ids[:-1], x).log_softmax(1)
            for x in (Setting(), Setting(selector, (0, 10, *[79] * (num_layers - 2)), 1, 2, 4))
        )
        kl = torch.nn.functional.kl_div(sparse, dense, log_target=True, reduction="batchmean")
        expected.append(float(kl))
    assert float(losses.kl[0, 0]) == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert sum(expected) > 1e-3


def test_budgets_are_chosen_once_and_measured(tmp_path, capsys):
    folder, path = save_tiny_llama(tmp_path / "model"), tmp_path / "new" / "budgets.json"
    args = ["eval", "--model", folder, "--csv", tmp_path / "rows.csv", "--device", "cpu"]
    args += ["--context", 400, "--num-decoded", 8, "--num-samples", 2, "--task", "likelihood"]
    args += ["--method", "hata", "--random-bits", 64, "--no-key-norms", "--num-dense-layers", 1]
    args += ["--top-k", 40, "--top-k", 80, "--layer-budgets", path, "--choose-on", Path(__file__)]

    def run(*more: object) -> list[dict[str, str]]:
        with pytest.raises(SystemExit) as exited:
            hata.cli.main([str(x) for x in (*args, *more)])
        assert exited.value.code == 0, capsys.readouterr().err
        with (tmp_path / "rows.csv").open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["layer_budgets"]]

    rows = run()
    assert [(row["top_k"], row["query_bits"]) for row in rows] == [
        ("40", "1"),
        ("80", "1"),
        ("40", "4"),
        ("80", "4"),
    ]
    written = path.read_text()
    found = json.loads(written)
    assert found["alone"]["layers"] == [1, 2, 3]
    assert found["alone"]["top_k"] == [20, 40, 80, 160]
    for level, top_k in zip(found["levels"], (40, 80), strict=True):
        own = HataConfig(top_k=level["per_layer"]["top_k"]).layer_top_k(NUM_LAYERS)
        assert (sum(own[1:]), level["uniform"]["top_k"]) == (3 * top_k, top_k)
        assert len(set(own[1:])) > 1
    assert run("--top-k", 80) == rows
    assert path.read_text() == written
