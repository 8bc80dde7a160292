"""A training run: interrupted anywhere, it gives what it would have given."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hata
import hata.training.parts
from closeness import assert_equal
from hata.training.data import TrainingData
from hata.training.options import CaptureOptions
from hata.training.recipes import RECIPES
from hata.training.recipes.hata import HataRecipe
from hata.training.source import Source, random_source
from hata.training.train import TrainOptions, layer_bytes, train

SIZES = CaptureOptions(num_sequences=2, seq_len=128, num_queries=16)
SOURCE = random_source("3x4x2x32", SIZES, num_sink=2, num_recent=4)
RECIPE = HataRecipe(num_bits=32, num_steps=12, num_queries=8, num_keys=64)


def options(**changes: Any) -> TrainOptions:
    two_layers = 2.5 * layer_bytes(SOURCE, RECIPE) / 1e9
    given = {
        "recipe": RECIPE,
        "budgets": (8, 16),
        "memory_limit_gb": two_layers,
        "device": torch.device("cpu"),
        "checkpoint_every": 4,
    }
    return TrainOptions(**{**given, **changes})


class Killed(Exception):
    pass


@dataclass
class Killer:
    """Raises after a number of steps."""

    steps: int
    taken: list[int] = field(default_factory=list)

    def __call__(self, layers: int) -> None:
        self.taken.append(layers)
        if len(self.taken) == self.steps:
            raise Killed


def test_the_file_says_what_it_is(tmp_path):
    out = tmp_path / "weights.safetensors"
    parts = train(SOURCE, SOURCE, out, options(), {"model": "random"})
    weights = hata.load_weights(out)
    assert weights.shape == (3, 2, 32, 32)
    assert weights.metadata["recipe"] == "hata"
    assert weights.metadata["model"] == "random"
    assert (weights.query_bits, weights.key_norms) == (4, False)
    assert '"num_steps": 12' in weights.metadata["config"]
    assert [file.name for file in tmp_path.iterdir()] == [out.name]
    for layer_idx, part in enumerate(parts):
        assert_equal(weights.key_weights[layer_idx], part.key_weights)
        assert part.losses.shape == (12,)
        lost, lost_exact, recall = part.scores
        assert bool((lost >= lost_exact - 1e-6).all())
        assert bool((recall > 0).all())


@pytest.mark.parametrize("name", ["hata", "paper"])
@pytest.mark.parametrize("killed_at", [3, 7, 12, 14, 22])  # before, between, at checkpoints; layers
def test_a_killed_run_resumes_bit_for_bit(tmp_path, name, killed_at):
    recipe = RECIPE
    if name == "paper":
        recipe = RECIPES[name](
            num_bits=32, num_pairs=800, chunk_pairs=100, num_epochs=4, steps_per_epoch=3
        )
    chosen = options(recipe=recipe, memory_limit_gb=2.5 * layer_bytes(SOURCE, recipe) / 1e9)
    out = tmp_path / "whole.safetensors"
    train(SOURCE, None, out, chosen, {})
    killed = tmp_path / "killed.safetensors"
    with pytest.raises(Killed):
        train(SOURCE, None, killed, chosen, {}, on_step=Killer(killed_at))
    assert not killed.exists()
    resumed = Killer(10**9)
    train(SOURCE, None, killed, chosen, {}, on_step=resumed)
    whole, continued = hata.load_weights(out), hata.load_weights(killed)
    assert_equal(continued.key_weights, whole.key_weights)
    if name == "hata":
        assert_equal(continued.query_weights, whole.query_weights)
    assert sum(resumed.taken) == 3 * 12  # the bar ends full


def test_finished_layers_are_not_trained_again(tmp_path):
    @dataclass(frozen=True)
    class Counting(Source):
        def load(self, layers: Any, device: torch.device) -> TrainingData:
            loaded.extend(layers)
            return super().load(layers, device)

    loaded: list[int] = []
    source = Counting(**vars(SOURCE))
    out = tmp_path / "weights.safetensors"
    with pytest.raises(Killed):
        train(source, None, out, options(), {}, on_step=Killer(12 + 3))
    assert loaded == [0, 1, 2]
    train(source, None, out, options(), {})
    assert loaded == [0, 1, 2, 2]


def test_layers_do_not_depend_on_how_many_are_trained_at_once(tmp_path):
    paths = [tmp_path / name for name in ("one", "all")]
    for path, count in zip(paths, (1.5, 4), strict=True):
        limit = count * layer_bytes(SOURCE, RECIPE) / 1e9
        recipe = replace(RECIPE, num_steps=3)
        train(SOURCE, None, path, options(recipe=recipe, memory_limit_gb=limit), {})
    one, every = (hata.load_weights(path).key_weights for path in paths)
    # float32 products in batches of another size; Adam's first steps amplify them
    torch.testing.assert_close(one, every, rtol=1e-2, atol=1e-3)


def test_other_settings_do_not_continue_a_run(tmp_path):
    out = tmp_path / "weights.safetensors"
    with pytest.raises(Killed):
        train(SOURCE, None, out, options(), {}, on_step=Killer(2))
    other = options(recipe=replace(RECIPE, seed=1))
    with pytest.raises(ValueError, match=r"settings of the interrupted run .* got other seed"):
        train(SOURCE, None, out, other, {})


def test_a_full_disk_is_said_and_finished_layers_stay(tmp_path, monkeypatch):
    def fail(tensors: Any, path: Path) -> None:
        if "layer-002" in path.name:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    save_file = hata.training.parts.save_file
    out = tmp_path / "weights.safetensors"
    monkeypatch.setattr(hata.training.parts, "save_file", fail)
    with pytest.raises(ValueError, match=r"must have room for layer-002.* No space left"):
        train(SOURCE, None, out, options(), {})
    left = sorted(file.name for file in (tmp_path / "weights.safetensors.parts").glob("layer*"))
    assert left == ["layer-000.safetensors", "layer-001.safetensors"]


def test_nan_in_captures_is_an_error(tmp_path):
    class Broken(Source):
        def load(self, layers: Any, device: torch.device) -> TrainingData:
            data = super().load(layers, device)
            data.k[0, 1, 5] = torch.nan
            return data

    out = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match=r"captures of layers \[0, 1\] must be finite, got NaN"):
        train(Broken(**vars(SOURCE)), None, out, options(), {})


def test_an_infinite_loss_names_its_layer(tmp_path):
    class Large(Source):
        def load(self, layers: Any, device: torch.device) -> TrainingData:
            data = super().load(layers, device)
            data.k[:, 2:] *= 1e30  # of layer 1: its logits overflow float32
            data.q[:, 2:] *= 1e20
            return data

    out = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match=r"the loss of layers \[1\] at step 0 must stay finite"):
        train(Large(**vars(SOURCE)), None, out, options(), {})


def test_too_little_memory_for_one_layer_is_an_error(tmp_path):
    out = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match="memory_limit_gb must be at least"):
        train(SOURCE, None, out, options(memory_limit_gb=1e-6), {})
