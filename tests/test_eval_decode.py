"""One forward pass of `hata eval` is what decoding step by step through `enable` gives."""

from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from families import FAMILIES, Family
from hata import HashWeights
from hata.eval.decode import SparseDecoder
from hata.eval.setting import DENSE, Setting
from hata.integrations.model_shape import full_attention_layers, model_shape
from hata.integrations.transformers import CACHE_ARGUMENT, enabled
from hata.selectors import (
    ExactSelector,
    H2oSelector,
    HataSelector,
    InfinigenSelector,
    QuestSelector,
    SnapkvSelector,
    StreamingSelector,
    VattentionSelector,
)
from tiny_models import FEW, MODELS, make_model, random_prompt

PROMPT, DECODED = 70, 9
asked: list[int] = []  # the layers that an `Asked` was asked for


class Asked(StreamingSelector):
    def index(self, layer_idx, *args):
        asked.append(layer_idx)
        return super().index(layer_idx, *args)


def family_of(model: str) -> Family:
    return next(family for family in FAMILIES if family.model == model)


# float32, in which the two agree to the last digits; caches on a GPU have 16 bits.
# Logits of Gemma 2 are capped, those of gpt-oss have sinks.
@pytest.mark.parametrize(
    ("name", "share"),
    [("llama-group4", 1), ("llama-group4", 2), ("qwen3", 1), ("Gemma2", 1), ("GptOss", 1)],
)
def test_one_pass_is_decoding_step_by_step(name, share):
    model = make_model(name) if name in MODELS else family_of(name).make()
    weights = HashWeights.random(**model_shape(model), num_bits=64)
    prompt, answer = random_prompt(1, PROMPT + DECODED).split((PROMPT, DECODED), 1)
    steps = []
    config = replace(FEW, share_selection=share)
    with torch.no_grad(), enabled(model, config, weights=weights) as cache:
        model(prompt, **{CACHE_ARGUMENT: cache})
        for token in answer.split(1, 1):
            steps.append(model(token, **{CACHE_ARGUMENT: cache}).logits[0, 0])

    decoder = SparseDecoder(model)
    decoder.read(prompt[0].tolist())
    weights = weights.for_model("test", **model_shape(model), layers=full_attention_layers(model))
    setting = Setting(HataSelector(weights), FEW.top_k, FEW.num_dense_layers, 2, 4, share)
    for _ in range(2):  # each call begins where the prompt ends
        found = decoder.decode(answer[0].tolist(), setting)
        torch.testing.assert_close(found, torch.stack(steps), rtol=1e-4, atol=1e-4)
    dense = decoder.decode(answer[0].tolist(), DENSE)
    assert (dense - found).abs().max() > 1e-2  # the budget is felt


@pytest.mark.parametrize("name", ["qwen2-group3", "Gemma2", "GptOss"])
@pytest.mark.parametrize(
    "selector", [ExactSelector(), QuestSelector(8), VattentionSelector(ExactSelector())]
)
def test_a_budget_of_everything_is_dense(device, selector, name):
    model = (make_model(name) if name in MODELS else family_of(name).make()).to(device)
    tokens = random_prompt(1, PROMPT + DECODED, device)
    with torch.no_grad():
        expected = model(tokens).logits[0, PROMPT:]
    decoder = SparseDecoder(model)
    decoder.read(tokens[0, :PROMPT].tolist())
    answer = tokens[0, PROMPT:].tolist()
    for setting in (DENSE, Setting(selector, top_k=80)):
        torch.testing.assert_close(decoder.decode(answer, setting), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "selector",
    [
        SnapkvSelector(window=5, num_neighbors=3),
        H2oSelector(),
        InfinigenSelector(20),
        VattentionSelector(ExactSelector()),
    ],
    ids=lambda x: x.name,
)
@pytest.mark.parametrize("name", ["qwen3", "Gemma3", "Llama4"])
def test_a_token_is_decoded_by_what_is_before_it(device, selector, name):
    """The first tokens of a pass are what a shorter pass gives: no later query is heard.

    Layers of Gemma 3 and Llama 4 see a window or everything, with a rotation of their own each.
    """
    model = (make_model(name) if name in MODELS else family_of(name).make()).to(device)
    tokens = random_prompt(1, PROMPT + DECODED, device)[0].tolist()
    decoder = SparseDecoder(model, observe=selector.observes)
    decoder.read(tokens[:PROMPT])
    setting = Setting(selector, 12, 1, 2, 4)
    found = decoder.decode(tokens[PROMPT:], setting)
    shorter = decoder.decode(tokens[PROMPT : PROMPT + 4], setting)
    torch.testing.assert_close(shorter, found[:4], rtol=1e-4, atol=1e-4)
    assert (decoder.decode(tokens[PROMPT:]) - found).abs().max() > 1e-2  # the budget is felt


@torch.inference_mode()
def test_queries_are_foreseen_from_the_input_of_the_layer_before(device):
    """Layer 2 scores with what its weights make of layer 1's input; layer 0 with its own."""
    model = make_model("llama-group4", device)
    tokens = random_prompt(1, PROMPT + DECODED, device)
    asked_with, entered, turned = [], {}, []

    class Foreseen(InfinigenSelector):
        def index(self, *args):
            return lambda q, positions: asked_with.append(q) or super(Foreseen, self).index(*args)(
                q, positions
            )

    decoder = SparseDecoder(model, observe=True)
    decoder.read(tokens[0, :PROMPT].tolist())
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layer.input_layernorm.register_forward_hook(
            lambda _, args, out, i=i: entered.__setitem__(i, out)
        )
    model.model.rotary_emb.register_forward_hook(lambda _, args, out: turned.append(out))
    decoder.decode(tokens[0, PROMPT:].tolist(), Setting(Foreseen(20), 12, 0, 2, 4))
    for i in range(len(layers)):
        q = layers[i].self_attn.q_proj(entered[max(i - 1, 0)]).unflatten(2, (-1, 64))
        expected, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), *turned[0])
        found = asked_with[i].flatten(1, 2).transpose(0, 1)[None]
        torch.testing.assert_close(found, expected)
    assert not any(layer.self_attn._forward_pre_hooks for layer in layers)


def test_layers_that_share_attend_to_the_selection_of_the_first(device):
    """Of layers 1 and 2 the first alone asks the selector; both attend to what it says."""
    model = make_model("llama-group4", device)
    tokens = random_prompt(1, PROMPT + DECODED, device)[0].tolist()
    asked.clear()
    decoder = SparseDecoder(model)
    decoder.read(tokens[:PROMPT])
    own = decoder.decode(tokens[PROMPT:], Setting(Asked(), 12, 1, 2, 4))
    shared = decoder.decode(tokens[PROMPT:], Setting(Asked(), 12, 1, 2, 4, share_selection=2))
    assert asked == [1, 2, 1]
    torch.testing.assert_close(shared, own)  # what it says is the same in all layers


@pytest.mark.parametrize("model", ["Gemma3", "Qwen3Next", "Mistral"])
def test_only_layers_that_see_the_whole_context_are_sparse(device, model):
    family = family_of(model)
    tokens = random_prompt(1, PROMPT + DECODED, device)[0].tolist()
    decoder = SparseDecoder(family.make().to(device))
    decoder.read(tokens[:PROMPT])
    dense = decoder.decode(tokens[PROMPT:])
    asked.clear()
    everything = decoder.decode(tokens[PROMPT:], Setting(Asked(), 80))
    assert asked == list(range(len(family.layers)))
    torch.testing.assert_close(everything, dense)
    few = decoder.decode(tokens[PROMPT:], Setting(Asked(), 4))
    assert (few - dense).abs().max() > 1e-3


def test_a_model_whose_layers_all_have_a_window_stays_dense(device):
    model = make_model("mistral", device, sliding_window=16)
    tokens = random_prompt(1, PROMPT + DECODED, device)[0].tolist()
    decoder = SparseDecoder(model)
    decoder.read(tokens[:PROMPT])
    dense = decoder.decode(tokens[PROMPT:])
    sparse = decoder.decode(tokens[PROMPT:], Setting(ExactSelector(), top_k=1))
    torch.testing.assert_close(sparse, dense)


def test_a_model_with_windows_reads_its_prompt_in_pieces(device, monkeypatch):
    """Layers that see everything and layers with a window take turns."""
    monkeypatch.setattr("hata.eval.decode._PIECE", 32)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 16, "layer_types": kinds}
    model = make_model("qwen3", device, **windows)
    tokens = random_prompt(1, PROMPT + DECODED, device)
    with torch.no_grad():
        expected = model(tokens).logits[0, PROMPT:]
    lengths = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    decoder = SparseDecoder(model)
    decoder.read(tokens[0, :PROMPT].tolist())
    found = decoder.decode(tokens[0, PROMPT:].tolist())
    assert lengths == [32, 32, PROMPT - 64, DECODED]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_token_is_refused(device):
    decoder = SparseDecoder(make_model("llama-group1", device))
    decoder.read([1, 2, 3])
    with pytest.raises(ValueError, match="decode: token_ids must be at least 2, got 1"):
        decoder.decode([1])


def test_a_model_that_keeps_the_setting_to_itself_is_refused(device):
    model = make_model("llama-group1", device)
    decoder = SparseDecoder(model)
    decoder.read([1, 2, 3])
    model.register_forward_pre_hook(
        lambda _, args, settings: (args, settings | {"hata_selection": None}), with_kwargs=True
    )
    with pytest.raises(ValueError, match=r"model must hand its arguments on .* LlamaForCausalLM"):
        decoder.decode([1, 2], Setting(ExactSelector(), 1))
