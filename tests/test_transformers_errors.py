import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import Cache

from families import FAMILIES
from hata import HashWeights
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import CACHE_ARGUMENT, disable, enable
from tiny_models import EVERYTHING, POSITIONS, generate, make_model, make_weights, random_prompt

SMALL = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 64, "num_bits": 64}


def encoder_decoder() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=8, num_layers=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(1, 1), "model must be a PreTrainedModel, got Linear"),
        (
            lambda: torch.compile(make_model("llama-group1")),
            "model must be a PreTrainedModel, got OptimizedModule",
        ),
        (encoder_decoder, "model must be a text-only decoder, got T5ForConditionalGeneration"),
        (
            lambda: BertModel(BertConfig(hidden_size=12, num_hidden_layers=1, vocab_size=9)),
            "model must be able to generate text, got BertModel",
        ),
    ],
)
def test_rejects_a_model(make: Callable[[], Any], message: str) -> None:
    model = make()
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        enable(model, EVERYTHING, weights=HashWeights.random(**SMALL), max_seq_len=16)
    if isinstance(model, PreTrainedModel):
        assert model.config._attn_implementation != "hata"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": 64}, "config must be a HataConfig, got int"),
        ({"weights": 64}, "weights must be HashWeights or the name of a file, got int"),
        ({"weights": "no/such"}, "path must name an existing file, got no/such"),
        (
            {"weights": HashWeights.random(**{**SMALL, "num_kv_heads": 1})},
            "weights must be for the model's (num_kv_heads, head_dim), (2, 64), got (1, 64)",
        ),
        (
            {"weights": HashWeights.random(**{**SMALL, "num_layers": 2})},
            "weights must be for the model's 3 layers, got layers [0, 1]",
        ),
        ({"max_seq_len": 161}, "max_seq_len must be in 1..160, got 161"),
        ({"max_seq_len": 0}, "max_seq_len must be in 1..160, got 0"),
        ({"max_seq_len": "8K"}, "max_seq_len must be an int, got str"),
        ({"page_size": 12}, "page_size must be a power of two, got 12"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be None or torch.float8_e4m3fn, got fp8"),
        ({"observer": 1}, "observer must be callable, got int"),
    ],
)
def test_rejects_arguments(changes: dict[str, Any], message: str) -> None:
    model = make_model("llama-group4")
    arguments = {
        "config": EVERYTHING,
        "weights": HashWeights.random(**SMALL),
        "max_seq_len": POSITIONS,
        **changes,
    }
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        enable(model, **arguments)
    assert model.config._attn_implementation != "hata"


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama-group4")


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(2, 7), r"cover the tokens of the cache and the new ones, got \[2, 7\]"),
        (
            torch.ones(1, 1, 9, 9, dtype=torch.bool).tril(),
            r"have two dimensions, got \[1, 1, 9, 9\]",
        ),
    ],
)
def test_rejects_a_mask(model: PreTrainedModel, mask: torch.Tensor, got: str) -> None:
    cache = enable(model, EVERYTHING, weights=make_weights(model), max_seq_len=POSITIONS)
    with pytest.raises(ValueError, match=f"attention_mask must {got}"):
        model(random_prompt(2, 9), attention_mask=mask, **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 0


def test_rejects_a_window_that_is_not_the_caches() -> None:
    model = next(family.make() for family in FAMILIES if family.model == "Gemma3")
    cache = enable(model, EVERYTHING, weights=HashWeights.random(**model_shape(model)))
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="attention_mask must be a causal window of 16"):
        model(random_prompt(2, 20), **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_rejects_another_cache(model: PreTrainedModel, kind: type[Cache]) -> None:
    enable(model, EVERYTHING, weights=make_weights(model), max_seq_len=POSITIONS)
    settings = {"max_cache_len": 32} if kind is StaticCache else {}
    other = kind(config=model.config, **settings)
    rule = f"be None or what enable.. returned, got {kind.__name__}"
    with pytest.raises(ValueError, match=rule):
        model(random_prompt(1, 9), **{CACHE_ARGUMENT: other})
    with pytest.raises(ValueError, match=rule):
        generate(model, random_prompt(1, 9), 2, **{CACHE_ARGUMENT: other})


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_rejects_a_request_for_another_cache(model: PreTrainedModel, kind: str) -> None:
    enable(model, EVERYTHING, weights=make_weights(model), max_seq_len=POSITIONS)
    with pytest.raises(ValueError, match=f"cache_implementation must be None, got {kind}"):
        generate(model, random_prompt(1, 9), 2, cache_implementation=kind)


def test_continuous_batching_is_refused_while_the_model_is_enabled(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = object()
    own = lambda self, **kwargs: made  # noqa: E731
    monkeypatch.setattr(type(model), "init_continuous_batching", own)
    enable(model, EVERYTHING, weights=make_weights(model), max_seq_len=POSITIONS)
    rule = r"generate_batch: continuous batching must be used after disable\(model\)"
    with pytest.raises(ValueError, match=rule):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match=rule):
        generate(model, random_prompt(1, 9), 2, cache_implementation="paged")
    model.set_attn_implementation("sdpa")
    assert model.init_continuous_batching() is made
    disable(model)
    assert "init_continuous_batching" not in vars(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_its_cache_is_of_no_use_to_other_attention(model: PreTrainedModel, attention: str) -> None:
    cache = enable(model, EVERYTHING, weights=make_weights(model), max_seq_len=POSITIONS)
    model.set_attn_implementation(attention)
    with pytest.raises(ValueError, match=r'keys of a hata cache must go to .* "hata"'):
        generate(model, random_prompt(1, 9), 2, **{CACHE_ARGUMENT: cache})


def test_rejects_a_context_that_is_too_long(model: PreTrainedModel) -> None:
    cache = enable(model, EVERYTHING, weights=make_weights(model), max_seq_len=20)
    rule = "sequence lengths must be at most max_seq_len=20, got"
    with pytest.raises(ValueError, match=rf"{rule} \[21\]"):
        generate(model, random_prompt(1, 21), 1, **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match=rf"{rule} \[21\]"):
        generate(model, random_prompt(1, 18), 9, **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 20


def test_rejects_another_batch_while_it_holds_tokens(model: PreTrainedModel) -> None:
    cache = enable(model, EVERYTHING, weights=make_weights(model), max_seq_len=POSITIONS)
    model(random_prompt(2, 9), **{CACHE_ARGUMENT: cache})
    with pytest.raises(ValueError, match=r"q must have shape \[batch=2, .*, got \[1, 9, 8, 64\]"):
        model(random_prompt(1, 9), **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 9


def test_rejects_dropout() -> None:
    model = make_model("llama-group1", attention_dropout=0.1).train()
    cache = enable(model, EVERYTHING, weights=make_weights(model), max_seq_len=POSITIONS)
    with pytest.raises(ValueError, match=r"dropout must be 0 \(call model\.eval\(\)\), got 0\.1"):
        model(random_prompt(1, 9), **{CACHE_ARGUMENT: cache})


def test_rejects_changes_of_the_batch_and_of_the_length(model: PreTrainedModel) -> None:
    cache = enable(model, EVERYTHING, weights=make_weights(model), max_seq_len=POSITIONS)
    model(random_prompt(2, 9), **{CACHE_ARGUMENT: cache})
    for tokens, rule in ((1, r"must be in -9\.\.0, got 1"), (-10, r"must be in -9\.\.0, got -10")):
        with pytest.raises(ValueError, match=f"tokens_to_remove {rule}"):
            cache.crop(tokens)
    with pytest.raises(ValueError, match="the batch must stay as it is, got 2 repeats"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="the batch must stay as it is, got the selection"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"batch_idx must be in 0\.\.1, got 2"):
        cache.reorder_cache(torch.tensor([0, 2]))
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("error", [KeyError("no"), KeyboardInterrupt(), torch.OutOfMemoryError()])
def test_whatever_happens_while_it_is_tried_the_model_is_unchanged(
    model: PreTrainedModel, error: BaseException
) -> None:
    def fail(*args: object) -> None:
        raise error

    model.train()
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    raised = ValueError if isinstance(error, KeyError) else type(error)
    with pytest.raises(raised):
        enable(model, EVERYTHING, weights=make_weights(model))
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert "_hata" not in vars(model)


def test_a_layer_that_does_not_attend_is_refused(model: PreTrainedModel) -> None:
    model.model.layers[2].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ValueError, match=r"must call its attention function.*\[2, 2, 0\] calls"):
        enable(model, EVERYTHING, weights=make_weights(model))
    assert model.config._attn_implementation == "sdpa"
