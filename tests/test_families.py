"""Every family of docs/models.md, as a tiny random model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hata
from closeness import assert_equal
from families import FAMILIES, POSITIONS, Family, table
from hata import HashWeights, HataConfig
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import CACHE_ARGUMENT, disable, enable
from tiny_models import generate, random_prompt

pytestmark = pytest.mark.usefixtures("few_spare_rows")

EVERYTHING = HataConfig(top_k=POSITIONS, num_dense_layers=0, min_sparse_len=0)
SUPPORTED = [family for family in FAMILIES if family.layers]
REFUSED = [family for family in FAMILIES if not family.layers]
SIZES = {"num_kv_heads": 2, "head_dim": 32}
HYBRIDS = [family for family in SUPPORTED if family.layers != (0, 1, 2)]


def weights_of(model: Any) -> HashWeights:
    return HashWeights.random(**model_shape(model))


@pytest.mark.parametrize("family", SUPPORTED, ids=lambda family: family.name)
def test_the_text_of_a_family_is_the_dense_text_where_everything_is_selected(
    family: Family,
) -> None:
    model, prompt = family.make(), random_prompt(2, 21)
    everything = {"output_logits": True, "return_dict_in_generate": True}
    dense = generate(model, prompt, 25, **everything)
    before = model.config._attn_implementation
    steps = []

    def observe(layer_idx: int, q: Tensor, cache: hata.HataCache, *selection: Tensor) -> None:
        steps.append(layer_idx)

    cache = enable(model, EVERYTHING, weights=weights_of(model), observer=observe)
    assert cache.hata_layers == family.layers
    found = generate(model, prompt, 25, **everything, **{CACHE_ARGUMENT: cache})
    assert_equal(found.sequences, dense.sequences)
    torch.testing.assert_close(found.logits, dense.logits, rtol=1e-3, atol=1e-4)
    sharing = family.settings.get("num_kv_shared_layers", 0) // 2  # beside as many with a window
    assert steps == 24 * (1 + sharing) * list(range(len(family.layers)))
    assert cache.hata_cache is not None
    assert len(cache.hata_cache.k_cache) == len(family.layers)
    beams = generate(model, prompt, 8, num_beams=3)
    disable(model)
    assert model.config._attn_implementation == before
    assert_equal(beams, generate(model, prompt, 8, num_beams=3))


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_a_family_that_is_refused_stays_as_it_was(family: Family) -> None:
    model, prompt = family.make(), random_prompt(1, 9)
    before, text = model.config._attn_implementation, generate(model, prompt, 8)
    attributes, num_layers = set(vars(model)), model.config.num_hidden_layers
    with pytest.raises(ValueError, match=r"transformers\.enable: model must") as error:
        enable(model, EVERYTHING, weights=HashWeights.random(num_layers=num_layers, **SIZES))
    assert family.refusal in str(error.value)
    assert model.config._attn_implementation == before
    assert set(vars(model)) == attributes
    assert_equal(generate(model, prompt, 8), text)


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: family.name)
def test_a_reset_cache_starts_anew_in_every_kind_of_layer(family: Family) -> None:
    model = family.make()
    cache = enable(model, EVERYTHING, weights=weights_of(model))
    generate(model, random_prompt(2, 30), 9, **{CACHE_ARGUMENT: cache})
    cache.reset()
    prompt = random_prompt(3, 24)
    text = generate(model, prompt, 9, **{CACHE_ARGUMENT: cache})
    disable(model)
    assert_equal(text, generate(model, prompt, 9))


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: family.name)
def test_weights_and_budgets_belong_to_the_layers_of_the_model(family: Family) -> None:
    model, layers = family.make(), list(family.layers)
    num_layers = model.config.num_hidden_layers
    config = HataConfig(
        top_k=tuple(30 + i for i in range(num_layers)), num_dense_layers=1, min_sparse_len=0
    )
    weights = weights_of(model)
    some = HashWeights(weights.key_weights[layers], layers=tuple(layers))
    prompt = random_prompt(1, 60)
    texts = []
    for given in (weights, some):
        cache = enable(model, config, weights=given)
        texts.append(generate(model, prompt, 12, **{CACHE_ARGUMENT: cache}))
    assert_equal(*texts)
    assert cache.hata_cache is not None
    budgets = cache.hata_cache.layer_budgets
    assert [budget.top_k for budget in budgets] == [30 + i for i in layers]
    assert cache.hata_cache.config.num_dense_layers == (1 if 0 in layers else 0)
    others = HashWeights(weights.key_weights[layers], layers=tuple(i + 1 for i in layers))
    with pytest.raises(ValueError, match=rf"weights must be for .*{num_layers} layers"):
        enable(model, config, weights=others)


def test_the_documented_table_is_the_tested_one() -> None:
    page = Path(__file__).parents[1] / "docs/models.md"
    assert table() in page.read_text()


@pytest.mark.parametrize("logits_to_keep", [0, 1, 3])
def test_passes_without_a_cache_are_the_model_s_where_layers_share_keys(
    logits_to_keep: int,
) -> None:
    """Gemma 4 leaves such layers the tokens alone of which logits are asked for."""
    model = next(f for f in FAMILIES if f.name.startswith("Gemma 4")).make()
    prompt, mask = random_prompt(3, 23), torch.ones(3, 23, dtype=torch.long)
    mask[1, :7] = 0

    def run() -> list[Tensor]:
        settings = {"use_cache": False, "logits_to_keep": logits_to_keep}
        return [model(prompt, attention_mask=m, **settings).logits for m in (None, mask)]

    with torch.no_grad():
        dense = run()
        enable(model, EVERYTHING, weights=weights_of(model))
        torch.testing.assert_close(run(), dense, rtol=1e-4, atol=1e-5)
