"""The layers that select for those after them, from captures."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from capture_cases import NUM_KV_HEADS, NUM_LAYERS, SHAPE, make_captures
from hata import HashWeights, HataConfig, save_weights
from hata.cli import main
from hata.recall.measure import measure
from hata.recall.options import MeasureOptions
from hata.recall.sharing import measured_on, shared_mass, sharings
from hata.selectors import ExactSelector, rank


def mass_of(mass: torch.Tensor, selecting: tuple[int, ...]) -> float:
    found = [mass[max(a for a in selecting if a <= layer), layer] for layer in range(len(mass))]
    return float(sum(found)) / len(found)


def test_no_other_layers_find_more() -> None:
    mass = torch.rand(7, 7, dtype=torch.float64).triu()
    found = sharings(mass)
    for count, sharing in enumerate(found, start=1):
        options = [(0, *rest) for rest in itertools.combinations(range(1, 7), count - 1)]
        best = max(options, key=lambda selecting: mass_of(mass, selecting))
        assert sharing.selecting == best
        assert sharing.attention_mass == pytest.approx(mass_of(mass, best))
    other = torch.rand(7, 7, dtype=torch.float64).triu()
    for sharing in measured_on(other, found):
        assert sharing.attention_mass == pytest.approx(mass_of(other, sharing.selecting))


@pytest.mark.parametrize("memory_limit_gb", [1.0, 1e-9])  # all queries at once, one by one
def test_mass_is_that_of_a_layers_softmax_on_anothers_selection(
    tmp_path: Path, memory_limit_gb: float
) -> None:
    captures = make_captures(tmp_path / "captures", sinks=True)
    options = MeasureOptions(top_k=[30], memory_limit_gb=memory_limit_gb, device="cpu")
    mass = shared_mass(captures, ExactSelector(), 30, 1, options)
    own = measure(captures, [ExactSelector()], options)[0].layers[1:]
    expected = torch.stack([quality.attention_mass.mean() for quality in own])
    torch.testing.assert_close(mass.diag(), expected)
    assert mass[1, 0] == 0

    selecting, sharing = captures.layer(1), captures.layer(2)
    found = []
    for i in range(2):
        for q1, q2, p in zip(selecting.q[i], sharing.q[i], selecting.positions[i], strict=True):
            q1, q2 = (q.unflatten(0, (NUM_KV_HEADS, -1))[None].float() for q in (q1, q2))
            score = ExactSelector().index(1, selecting.k[i], selecting.softmax)
            order = rank(score(q1, p[None]), p[None], 30, num_sink=4, num_recent=16)[0]
            logits = torch.einsum("hgd,shd->hgs", q2[0], sharing.k[i, : p + 1].float())
            logits = torch.cat(
                [logits * sharing.softmax.scale, sharing.softmax.sink_logits[..., None]], -1
            )
            shares = logits.softmax(-1)
            for head, positions in enumerate(order):
                held = shares[head][:, positions[positions >= 0]].sum(-1) + shares[head][:, -1]
                found.append(held.double().mean())
    torch.testing.assert_close(mass[0, 1], torch.stack(found).mean(), rtol=1e-5, atol=1e-6)


def test_the_command_writes_what_a_config_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_captures(tmp_path / "heldout", num_sequences=1)
    make_captures(tmp_path / "train", num_sequences=1)
    weights, file = tmp_path / "weights.safetensors", tmp_path / "share.json"
    save_weights(weights, HashWeights.random(**SHAPE))
    arguments = ["recall", str(tmp_path / "heldout"), "--calibration", str(tmp_path / "train")]
    arguments += ["--weights", str(weights), "--no-baselines", "--top-k", "40"]
    arguments += ["--num-dense-layers", "1", "--share-selection", str(file)]
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    assert "Shared selections" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert (written["top_k"], written["num_dense_layers"]) == (40, 1)
    assert [level["share_selection"] for level in written["levels"]] == [[1], [1, 2]]
    config = HataConfig(num_dense_layers=1, share_selection=written["levels"][0]["share_selection"])
    assert config.selecting_layers(NUM_LAYERS) == (0, 1, 1)
