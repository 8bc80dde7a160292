"""Hash weights that come with the package."""

import json

import pytest
import torch

import hata
from hata.pretrained import find_pretrained

SMOLLM2 = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64, "layers": tuple(range(30))}
GEMMA_HAS_NONE = "must be one of Qwen2.5-Coder-1.5B-Instruct, SmolLM2-135M-Instruct, got gemma"
GEMMA = {"num_layers": 18, "num_kv_heads": 1, "head_dim": 256, "layers": (5, 11, 17)}


def test_smollm2_has_weights_for_all_layers():
    weights = hata.pretrained_weights("SmolLM2-135M-Instruct")
    assert weights.shape == (30, 3, 64, 64)
    assert weights.query_weights is not None
    assert not torch.equal(weights.query_weights, weights.key_weights)
    assert weights.metadata["recipe"] == "hata"
    assert (weights.query_bits, weights.key_norms) == (4, False)
    config = json.loads(weights.metadata["config"])
    assert (config["num_bits"], config["seed"]) == (64, 0)
    assert len(weights.metadata["trained_on"].split(" | ")) == 64


def test_gemma_has_weights_for_the_layers_that_see_the_whole_context():
    weights = find_pretrained("gemma-3-270m.Q4_K_M", **GEMMA)
    assert weights is not None
    assert (weights.shape, weights.layers) == ((3, 1, 256, 128), (5, 11, 17))
    assert (weights.query_bits, weights.key_norms) == (4, False)
    assert weights.metadata["recipe"] == "hata"
    assert "Gemma Terms of Use" in weights.metadata["model_licence"]
    assert len(weights.metadata["trained_on"].split(" | ")) == 95
    for other in ({"num_kv_heads": 2}, {"head_dim": 128}, {"layers": tuple(range(18))}):
        assert find_pretrained("gemma-3-270m", **{**GEMMA, **other}) is None
    with pytest.raises(ValueError, match=GEMMA_HAS_NONE):
        hata.pretrained_config("gemma-3-270m")


def test_qwen_has_weights_for_all_layers():
    shape = {"num_layers": 28, "num_kv_heads": 2, "head_dim": 128, "layers": tuple(range(28))}
    weights = find_pretrained("Qwen2.5-Coder-1.5B-Instruct-Q4_K_M", **shape)
    assert weights is not None
    assert weights.shape == (28, 2, 128, 64)
    assert (weights.query_bits, weights.key_norms) == (4, False)
    assert weights.metadata["recipe"] == "hata"
    assert len(weights.metadata["trained_on"].split(" | ")) == 23


def test_the_settings_are_those_of_training_and_of_the_frontier():
    config = hata.pretrained_config("SmolLM2-135M-Instruct")
    assert (config.num_sink, config.num_recent, config.num_dense_layers) == (4, 16, 2)
    budgets = config.layer_top_k(30)
    assert len(set(budgets)) > 1
    assert sum(budgets[2:]) == 28 * 512


@pytest.mark.parametrize("num_dense_layers", [0, 2])
@pytest.mark.parametrize(
    ("model", "num_layers", "budgets"),
    [
        ("SmolLM2-135M-Instruct", 30, [64, 128, 256, 512, 1024]),
        ("Qwen2.5-Coder-1.5B-Instruct", 28, [512, 1024]),
    ],
)
def test_layers_share_out_what_one_budget_for_all_reads(
    model, num_layers, budgets, num_dense_layers
):
    frontier = hata.pretrained_frontier(model, num_dense_layers)
    assert model in frontier["model"]
    assert frontier["num_dense_layers"] == num_dense_layers
    assert [level["uniform"]["top_k"] for level in frontier["levels"]] == budgets
    for top_k, level in zip(budgets, frontier["levels"], strict=True):
        config = hata.pretrained_config(model, top_k, num_dense_layers)
        assert config.num_dense_layers == num_dense_layers
        own = config.layer_top_k(num_layers)
        assert list(own) == level["per_layer"]["top_k"]
        assert sum(own[num_dense_layers:]) == (num_layers - num_dense_layers) * top_k
        assert {level["uniform"]["num_bits"], *level["per_layer"]["num_bits"]} == {64}
    rule = rf"pretrained_config: top_k must be one of {budgets[0]}, .*100"
    with pytest.raises(ValueError, match=rule):
        hata.pretrained_config(model, 100, num_dense_layers)
    with pytest.raises(ValueError, match="num_dense_layers must be one of 0, 2, got 1"):
        hata.pretrained_frontier(model, 1)


@pytest.mark.parametrize("name", hata.pretrained_names())
def test_no_held_out_text_was_trained_on(name):
    metadata = hata.pretrained_weights(name).metadata
    trained_on, heldout = (
        {part.split("[")[0] for text in metadata[key].split(" | ") for part in text.split("; ")}
        for key in ("trained_on", "heldout")
    )
    assert heldout
    assert not trained_on & heldout
    assert not any("topics" in name for name in trained_on)  # what the demo's prompt is made of


@pytest.mark.parametrize("end", ["", ".Q4_1-0.1.2", "-GGUF"])
def test_what_follows_the_name_does_not_matter(end):
    assert find_pretrained(f"SmolLM2-135M-Instruct{end}", **SMOLLM2) is not None


def test_an_unknown_model_is_an_error():
    assert find_pretrained("SmolLM2-135M", **SMOLLM2) is None
    for name, first in (
        ("pretrained_weights", "Qwen2.5-Coder-1.5B-Instruct, SmolLM2-135M"),
        ("pretrained_frontier", "Qwen2.5-Coder-1.5B-Instruct, SmolLM2-135M"),
        ("pretrained_config", "Qwen2.5-Coder-1.5B-Instruct, SmolLM2-135M"),
    ):
        with pytest.raises(ValueError, match=rf"hata.{name}: model must be one of {first}"):
            getattr(hata, name)("SmolLM2-135M")
