"""``enable(model, verify="dense")``: the dense model's text, drafted sparsely."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from closeness import assert_equal
from families import FAMILIES, Family
from hata import HashWeights
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import CACHE_ARGUMENT, disable, enable
from tiny_models import FEW, generate, make_model, make_weights, random_prompt

HYBRIDS = [x for x in FAMILIES if x.name in ("Llama 4 (text)", "Gemma 3 (text)", "LFM 2")]


def switch_on(model: PreTrainedModel, num_draft_tokens: int = 3, **settings: Any) -> Any:
    settings = {"weights": HashWeights.random(**model_shape(model)), **settings}
    return enable(model, FEW, verify="dense", num_draft_tokens=num_draft_tokens, **settings)


@pytest.mark.parametrize(
    ("num_draft_tokens", "page_size", "num_tokens"), [(3, 16, 500), (1, None, 50), (31, None, 40)]
)
def test_500_tokens_are_those_of_the_dense_model(
    num_draft_tokens: int, page_size: int | None, num_tokens: int
) -> None:
    model = make_model("qwen2-group3", max_position_embeddings=640)
    prompt, q_lens = random_prompt(1, 40), set()
    dense = generate(model, prompt, num_tokens)
    cache = switch_on(
        model,
        num_draft_tokens,
        page_size=page_size,
        observer=lambda layer_idx, q, *_: q_lens.add(q.shape[1]),
    )
    assert_equal(generate(model, prompt, num_tokens, **{CACHE_ARGUMENT: cache}), dense)
    assert 0 < cache.num_accepted < cache.num_drafted
    assert q_lens == {1}  # only drafts are sparse
    assert cache.hata_cache.seq_lens == [39 + num_tokens]


def test_the_cache_holds_what_a_dense_model_puts_there() -> None:
    """Its sparse layers too, whose hidden states a sparse layer below would change."""
    model, prompt, caches = make_model("llama-group4"), random_prompt(1, 40), []
    for dense_layers in (1, 3):
        config = replace(FEW, num_dense_layers=dense_layers)
        verify = "dense" if dense_layers == 1 else None
        cache = enable(model, config, weights=make_weights(model), verify=verify)
        generate(model, prompt, 60, **{CACHE_ARGUMENT: cache})
        caches.append(cache.hata_cache)
    for layer_idx in range(3):
        kv = zip(*(cache.keys_values(layer_idx) for cache in caches), strict=True)
        for drafted, dense in kv:
            torch.testing.assert_close(drafted, dense)
        assert_equal(*(cache.code_cache[layer_idx][:, :, :99] for cache in caches))


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: family.name)
def test_layers_of_other_kinds_take_drafts_back_too(family: Family) -> None:
    model, prompt = family.make(), random_prompt(1, 50)
    dense = generate(model, prompt, 60)
    cache = switch_on(model)
    assert_equal(generate(model, prompt, 60, **{CACHE_ARGUMENT: cache}), dense)
    assert cache.num_drafted > 0


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: family.name)
@torch.no_grad()
def test_a_draft_leaves_the_cache_as_it_was(family: Family) -> None:
    model, prompt = family.make(), random_prompt(1, 50)
    logits = []
    for num_drafted in (0, 3):
        cache = switch_on(model)
        cache.announce_prompt(46)
        cache.activate_past_recording()
        model(prompt[:, :46], **{CACHE_ARGUMENT: cache})
        cache.crop(0)
        with cache.drafting():
            for i in range(46, 46 + num_drafted):
                model(prompt[:, i : i + 1], **{CACHE_ARGUMENT: cache})
        logits.append(model(prompt[:, 49:], **{CACHE_ARGUMENT: cache}).logits)
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.3}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
def test_other_ways_to_generate_are_dense(settings: dict[str, Any]) -> None:
    model, prompt = make_model("llama-group4"), random_prompt(1, 6).repeat(1, 6)
    dense = generate(model, prompt, 40, **settings)
    switch_on(model)
    assert_equal(generate(model, prompt, 40, **settings), dense)


def test_the_text_ends_where_the_dense_one_does() -> None:
    model, prompt = make_model("llama-group4"), random_prompt(1, 40)
    text = generate(model, prompt, 40)[0, 40:].tolist()
    switch_on(model, 8)
    for end in text[:12]:
        out = generate(model, prompt, 40, eos_token_id=end)
        assert out[0, 40:].tolist() == text[: text.index(end) + 1]


def test_a_conversation_with_padding() -> None:
    model, first = make_model("llama-group4"), random_prompt(1, 30)
    first[:, :5] = 0
    cache = switch_on(model)

    def turns(**settings: Any) -> Tensor:
        text = first
        for _ in range(2):
            mask = (torch.arange(text.shape[1]) >= 5).long()[None]
            text = generate(model, text, 20, attention_mask=mask, **settings)
            text = torch.cat([text, first[:, 5:12]], 1)
        return text

    drafted = turns(**{CACHE_ARGUMENT: cache})
    disable(model)
    assert_equal(drafted, turns())


def test_sequences_too_short_to_select_are_not_drafted() -> None:
    model, prompt = make_model("llama-group4"), random_prompt(1, 20)
    dense = generate(model, prompt, 40)
    config = replace(FEW, min_sparse_len=50)
    cache = enable(model, config, weights=make_weights(model), verify="dense", num_draft_tokens=2)
    assert_equal(generate(model, prompt, 25, **{CACHE_ARGUMENT: cache}), dense[:, :45])
    assert cache.num_drafted == 0
    cache.reset()
    assert_equal(generate(model, prompt, 40, **{CACHE_ARGUMENT: cache}), dense)
    assert cache.num_drafted > 0


def test_refuses_what_it_cannot_verify() -> None:
    model = make_model("llama-group4")
    weights = make_weights(model)
    with pytest.raises(ValueError, match=r'enable: verify must be None or "dense", got sparse'):
        enable(model, weights=weights, verify="sparse")
    with pytest.raises(ValueError, match=r"enable: num_draft_tokens must be in 1..31, got 32"):
        enable(model, weights=weights, verify="dense", num_draft_tokens=32)
    switch_on(model)
    with pytest.raises(ValueError, match="batch_size = 1"):
        generate(model, random_prompt(2, 20), 5)
    disable(model)
    assert generate(model, random_prompt(2, 20), 5).shape == (2, 25)
