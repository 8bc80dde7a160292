import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel
from transformers.cache_utils import Cache

import hata
from closeness import assert_equal, assert_no_worse_than_pytorch
from hata import HataConfig
from hata.integrations.transformers import CACHE_ARGUMENT, HataTransformersCache, enable
from tiny_models import (
    EVERYTHING,
    FEW,
    MODELS,
    NUM_LAYERS,
    POSITIONS,
    generate,
    make_model,
    make_weights,
    random_prompt,
)


def make_cache(
    model: PreTrainedModel, config: HataConfig = EVERYTHING, **settings: Any
) -> HataTransformersCache:
    return enable(model, config, weights=make_weights(model), max_seq_len=POSITIONS, **settings)


@torch.no_grad()
def logits_of(model: PreTrainedModel, chunks: list[Tensor], cache: Cache) -> Tensor:
    """The logits after each chunk of the tokens, ``[batch, chunks, vocabulary]``."""
    steps = [model(chunk, **{CACHE_ARGUMENT: cache}).logits[:, -1] for chunk in chunks]
    return torch.stack(steps, dim=1)


# float32, in which two of the 97 logits hardly ever come closer than rounding moves them
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_text_equals_the_dense_text_where_everything_is_selected(
    name: str, settings: dict[str, Any], page_size: int | None
) -> None:
    model, prompt = make_model(name), random_prompt(2, 21)
    torch.manual_seed(1)
    dense = generate(model, prompt, 25, **settings)
    cache = make_cache(model, page_size=page_size)
    torch.manual_seed(1)
    assert_equal(generate(model, prompt, 25, **{CACHE_ARGUMENT: cache}, **settings), dense)
    assert cache.get_seq_length() == 21 + 25 - 1  # the last token is not fed back


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_good_as_sdpa_where_everything_is_selected(
    device: str, dtype: torch.dtype, name: str
) -> None:
    model = make_model(name, device, dtype)
    truth = copy.deepcopy(model).double()
    tokens = random_prompt(2, 60, device)
    chunks = [tokens[:, :30], tokens[:, 30:40], *tokens[:, 40:].split(1, dim=1)]
    plain = logits_of(model, chunks, dynamic_cache(model))
    exact = logits_of(truth, chunks, dynamic_cache(truth))
    assert_no_worse_than_pytorch(logits_of(model, chunks, make_cache(model)), plain, exact)


def dynamic_cache(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def test_sparse_layers_report_what_they_selected(device: str) -> None:
    model = make_model("llama-group4", device, torch.float16)
    steps = []

    def observe(
        layer_idx: int,
        q: Tensor,
        cache: hata.HataCache,
        indices: Tensor,
        num_selected: Tensor,
    ) -> None:
        assert q.shape == (2, 1, 8, 64)
        assert indices.shape == (2, 1, 2, FEW.top_k)
        assert (num_selected == min(FEW.top_k, cache.seq_lens[0])).all()
        mass = hata.attention_mass(q, cache, layer_idx, indices)
        assert ((mass > 0) & (mass < 1)).all()
        assert (cache.last_cut(layer_idx)[1] > 0).all()
        steps.append((layer_idx, cache.seq_lens[0]))

    cache = make_cache(model, FEW, observer=observe)
    generate(model, random_prompt(2, 40, device), 6, **{CACHE_ARGUMENT: cache})
    assert steps == [(layer_idx, n) for n in range(41, 46) for layer_idx in (1, 2)]


def test_the_selection_changes_the_output() -> None:
    model, tokens = make_model("llama-group4"), random_prompt(1, 50)
    chunks = [tokens[:, :49], tokens[:, 49:]]
    dense = logits_of(model, chunks, dynamic_cache(model))
    sparse = logits_of(model, chunks, make_cache(model, FEW))
    torch.testing.assert_close(sparse[:, 0], dense[:, 0])  # the prompt is attended to densely
    assert (sparse[:, 1] - dense[:, 1]).abs().max() > 1e-3


def test_dense_layers_ignore_the_budget() -> None:
    model, prompt = make_model("qwen2-group3"), random_prompt(1, 30)
    dense = generate(model, prompt, 20)
    config = HataConfig(top_k=1, num_sink=0, num_recent=1, num_dense_layers=NUM_LAYERS)
    cache = make_cache(model, config)
    assert_equal(generate(model, prompt, 20, **{CACHE_ARGUMENT: cache}), dense)


def test_a_prompt_of_one_token() -> None:
    model, prompt = make_model("llama-group1"), random_prompt(2, 1)
    dense = generate(model, prompt, 10)
    assert_equal(generate(model, prompt, 10, **{CACHE_ARGUMENT: make_cache(model)}), dense)


def test_a_conversation_continues_and_a_reset_cache_starts_anew() -> None:
    model = make_model("llama-group4")
    cache = make_cache(model)
    first = generate(model, random_prompt(1, 20), 10, **{CACHE_ARGUMENT: cache})
    longer = torch.cat([first, random_prompt(1, 7)], dim=1)
    second = generate(model, longer, 10, **{CACHE_ARGUMENT: cache})
    cache.reset()
    assert cache.get_seq_length() == 0
    other = random_prompt(3, 15)  # another batch
    third = generate(model, other, 10, **{CACHE_ARGUMENT: cache})
    model.set_attn_implementation("sdpa")
    assert_equal(second, generate(model, longer, 10))
    assert_equal(third, generate(model, other, 10))


def test_crop_forgets_the_last_tokens() -> None:
    model, tokens = make_model("qwen3"), random_prompt(1, 40)
    cache = make_cache(model, FEW)
    expected = logits_of(model, [tokens[:, :30], tokens[:, 30:31]], cache)
    cache.crop(-1)
    assert cache.get_seq_length() == 30
    logits_of(model, [tokens[:, 33:36]], cache)
    cache.crop(-3)
    cache.crop(0)
    assert_equal(logits_of(model, [tokens[:, 30:31]], cache), expected[:, 1:])


def test_a_copied_cache_goes_its_own_way() -> None:
    model, tokens = make_model("llama-group1"), random_prompt(1, 40)
    cache = make_cache(model, FEW)
    logits_of(model, [tokens[:, :30]], cache)
    branch = copy.deepcopy(cache)
    expected = logits_of(model, [tokens[:, 30:31]], cache)
    logits_of(model, [tokens[:, 35:36]], branch)
    branch.crop(-1)
    assert_equal(logits_of(model, [tokens[:, 30:31]], branch), expected)
    assert (cache.get_seq_length(), branch.get_seq_length()) == (31, 31)
    # What is copied are the pages; the weights, which no cache changes, are not.
    mine, its = cache.hata_cache, branch.hata_cache
    assert mine is not None
    assert its is not None
    assert its.weights is mine.weights
    for name in ("k_cache", "v_cache", "code_cache"):
        for a, b in zip(getattr(mine, name), getattr(its, name), strict=True):
            assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
            assert a.data_ptr() != b.data_ptr()


def test_missing_weights_are_drawn_and_said_so() -> None:
    model = make_model("llama-group1")
    with pytest.warns(UserWarning, match=r"random orthogonal weights \(64 bits, seed 0\)"):
        cache = enable(model, FEW, max_seq_len=32)
    assert cache.weights.metadata["origin"] == "random orthogonal, seed 0"
    assert_equal(cache.weights.key_weights, make_weights(model).key_weights)
    assert cache.hata_cache is None  # until the first forward pass
    assert cache.get_max_length() == 32


def test_a_model_of_a_known_name_and_shape_gets_the_packages_weights() -> None:
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = make_model("llama-group1", hidden_size=72, **shape)
    model.name_or_path = "models/SmolLM2-135M-Instruct"
    cache = enable(model, top_k=24)
    assert cache.weights.metadata["recipe"] == "hata"
    assert (cache.config, cache.max_seq_len) == (HataConfig(top_k=24), POSITIONS)
    other = make_model("llama-group1")
    other.name_or_path = model.name_or_path
    with pytest.warns(UserWarning, match="the package has none for this model"):
        enable(other, top_k=24)


def test_the_packages_weights_may_be_for_some_layers() -> None:
    kinds = [("full" if i % 6 == 5 else "sliding") + "_attention" for i in range(18)]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 97, "num_hidden_layers": 18}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, layer_types=kinds)).eval()
    model.name_or_path = "models/gemma-3-270m"
    cache = enable(model, top_k=24, max_seq_len=32)
    assert cache.hata_layers == cache.weights.layers == (5, 11, 17)
    assert cache.weights.metadata["recipe"] == "hata"


def test_weights_can_be_named_by_their_file(tmp_path: Path) -> None:
    model = make_model("llama-group1")
    weights = make_weights(model, num_bits=96)
    hata.save_weights(tmp_path / "weights.safetensors", weights)
    cache = enable(model, FEW, weights=tmp_path / "weights.safetensors")
    assert_equal(cache.weights.key_weights, weights.key_weights)
