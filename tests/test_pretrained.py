"""Hash weights that come with the package."""

import json

import pytest
import torch

import hata
from hata.pretrained import find_pretrained


def test_smollm2_has_weights_for_all_layers():
    assert hata.pretrained_names() == ["SmolLM2-135M-Instruct"]
    weights = hata.pretrained_weights("SmolLM2-135M-Instruct")
    assert weights.shape == (30, 3, 64, 64)
    assert weights.query_weights is not None
    assert not torch.equal(weights.query_weights, weights.key_weights)
    assert weights.metadata["recipe"] == "hata"
    assert (weights.metadata["query_bits"], weights.metadata["key_norms"]) == ("4", "false")
    config = json.loads(weights.metadata["config"])
    assert (config["num_bits"], config["seed"]) == (64, 0)
    assert weights.metadata["trained_on"].count("|") == 15


def test_no_held_out_text_was_trained_on():
    metadata = hata.pretrained_weights("SmolLM2-135M-Instruct").metadata
    trained_on, heldout = (
        {part.split("[")[0] for text in metadata[name].split(" | ") for part in text.split("; ")}
        for name in ("trained_on", "heldout")
    )
    assert heldout
    assert not trained_on & heldout
    assert not any("topics" in name for name in trained_on)  # what the demo's prompt is made of


@pytest.mark.parametrize("end", ["", ".Q4_1-0.1.2", "-GGUF"])
def test_what_follows_the_name_does_not_matter(end):
    assert find_pretrained(f"SmolLM2-135M-Instruct{end}") is not None


def test_an_unknown_model_is_an_error():
    assert find_pretrained("SmolLM2-135M") is None
    with pytest.raises(ValueError, match=r"pretrained_weights: model must be one of SmolLM2-135M"):
        hata.pretrained_weights("SmolLM2-135M")
