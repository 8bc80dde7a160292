"""Decoding in CUDA graphs inside `generate`: the eager text, and eager passes where it must be."""

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from closeness import assert_equal
from devices import gpu_only
from families import FAMILIES, Family
from hata import HashWeights
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import CACHE_ARGUMENT, disable, enable
from tiny_models import FEW, POSITIONS, generate, make_model, random_prompt

DTYPE = torch.bfloat16
# Experts, states, keys that layers share: their code may turn out to be none for a graph.
_TRIED = ("Llama4", "Mixtral", "Qwen3Moe", "Glm4Moe", "Phimoe", "Olmoe", "GraniteMoe", "GptOss")
_TRIED += ("Qwen3Next", "Qwen3_5", "Bamba", "Jamba", "Lfm2", "Gemma3n")
TRIED = [family for family in FAMILIES if family.model in _TRIED]
WINDOWED = [f for f in FAMILIES if f.layers and "window" in f.notes and f not in TRIED]
SIZES = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}  # what kernels have


def switch_on(model: PreTrainedModel, config: Any = FEW, **settings: Any) -> Any:
    weights = HashWeights.random(**model_shape(model))
    return enable(model, config, weights=weights, **{"max_seq_len": POSITIONS, **settings})


@contextmanager
def replays_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    counted, replay = [0], torch.cuda.CUDAGraph.replay

    def count(graph: torch.cuda.CUDAGraph) -> None:
        counted[0] += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    yield counted


@gpu_only
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama-group4", "qwen3"])
def test_the_text_is_the_eager_text(
    name: str,
    settings: dict[str, Any],
    page_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(name, "cuda", DTYPE)
    batch = 1 if "prompt_lookup_num_tokens" in settings else 2
    prompt = random_prompt(batch, 7, "cuda").repeat(1, 4)
    out = []
    with replays_counted(monkeypatch) as replays:
        for cuda_graphs in (False, True):
            switch_on(model, cuda_graphs=cuda_graphs, page_size=page_size)
            torch.manual_seed(1)
            out += [generate(model, prompt, 30, **settings) for _ in range(2)]
            assert (replays[0] > 0) == cuda_graphs
    # Two caches: what is found out about the model with the first serves the second.
    assert_equal(out[2], out[0])
    assert_equal(out[3], out[1])
    if settings == {}:
        # Of 29 passes one is eager, of the first cache two; the first replay is a check.
        assert replays[0] == (29 - 2) + (29 - 1)


@gpu_only
@pytest.mark.parametrize("family", WINDOWED, ids=lambda family: family.name)
def test_layers_with_a_window_are_in_the_graph(
    family: Family, few_spare_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.make(**SIZES).to("cuda", DTYPE)
    ids = random_prompt(2, 40, "cuda")
    mask = torch.ones_like(ids)
    mask[1, :33] = 0  # sequences longer and shorter than the window
    draft = random_prompt(1, 7, "cuda").repeat(1, 4)
    settings = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    found = []
    with replays_counted(monkeypatch) as replays:
        for cuda_graphs in (False, True):
            cache = switch_on(model, cuda_graphs=cuda_graphs, max_seq_len=128)
            given = {CACHE_ARGUMENT: cache}
            ragged = model.generate(
                ids, attention_mask=mask, max_new_tokens=50, **settings, **given
            )
            held = copy.deepcopy(cache)
            turn = torch.cat([ragged, ids[:, :3]], 1)
            ones = torch.cat([mask, torch.ones_like(turn[:, 40:])], 1)
            given = {CACHE_ARGUMENT: held}
            found.append(
                [
                    ragged,
                    model.generate(
                        turn, attention_mask=ones, max_new_tokens=20, **settings, **given
                    ),
                    generate(model, ids, 20, num_beams=3),
                    generate(model, draft, 30, prompt_lookup_num_tokens=3),
                ]
            )
            assert (replays[0] > 0) == cuda_graphs
    for replayed, eager in zip(found[1], found[0], strict=True):
        assert_equal(replayed, eager)


@gpu_only
@pytest.mark.parametrize("family", TRIED, ids=lambda family: family.name)
def test_other_models_are_in_the_graph_or_a_warning_says_why_not(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.make(**SIZES).to("cuda", DTYPE)
    prompt = random_prompt(2, 21, "cuda")
    found = []
    with warnings.catch_warnings(record=True) as warned, replays_counted(monkeypatch) as replays:
        warnings.simplefilter("always")
        for cuda_graphs in (False, None):
            switch_on(model, cuda_graphs=cuda_graphs, max_seq_len=128)
            found += [generate(model, prompt, 30), generate(model, prompt, 12, num_beams=3)]
    refusals = [str(w.message) for w in warned if "cannot run in CUDA graphs" in str(w.message)]
    print(f"{family.name}: {replays[0]} replays, {refusals}")
    assert_equal(found[2], found[0])
    assert_equal(found[3], found[1])
    assert (replays[0] > 30) != bool(refusals)


@gpu_only
@pytest.mark.parametrize("name", ["llama-group4", "qwen3"])
def test_drafts_and_what_verifies_them_are_captured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = make_model(name, "cuda", DTYPE), random_prompt(1, 40, "cuda")
    texts = []
    with replays_counted(monkeypatch) as replays:
        for cuda_graphs in (False, True):
            settings = {"verify": "dense", "num_draft_tokens": 3, "cuda_graphs": cuda_graphs}
            cache = switch_on(model, **settings)
            texts.append(generate(model, prompt, 60, **{CACHE_ARGUMENT: cache}))
            rounds = cache.num_drafted / 3
            # The last drafts are of two tokens and of one, and the last token has none.
            assert rounds + cache.num_accepted + 1 >= 60 - 3
            assert replays[0] > (2 * rounds if cuda_graphs else -1)
    assert_equal(*texts)


@gpu_only
def test_lengths_on_both_sides_of_min_sparse_len_have_graphs_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("llama-group4", "cuda", DTYPE)
    config = replace(FEW, min_sparse_len=44)
    ids = torch.cat([torch.zeros(2, 30, dtype=torch.long), random_prompt(2, 30)], 1).to("cuda")
    ids[1, :30] = random_prompt(1, 30)
    mask = (ids != 0).long()  # sequences of 30 and 60 positions
    alone = ids[:1, 30:]
    found = []
    with replays_counted(monkeypatch) as replays:
        for cuda_graphs in (False, True):
            switch_on(model, config, cuda_graphs=cuda_graphs)
            settings = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False}
            found.append(model.generate(ids, attention_mask=mask, max_new_tokens=30, **settings))
            found.append(generate(model, alone, 30))
    assert_equal(found[2], found[0])
    assert_equal(found[3], found[1])
    # Passes are of four kinds: the ragged batch's with layers of both sorts, then sparse; the other
    # text's dense, then sparse. Of each kind one runs eagerly and one is watched.
    assert replays[0] == 2 * 29 - 4 * 2


@gpu_only
def test_a_cache_goes_on_after_reset_crop_and_another_batch() -> None:
    model, tokens = make_model("llama-group4", "cuda", DTYPE), random_prompt(2, 60, "cuda")
    logits: list[list[Tensor]] = []
    for cuda_graphs in (False, True):
        cache = switch_on(model, cuda_graphs=cuda_graphs)
        found = []
        for batch in (1, 2, 1):
            cache.reset()
            for start, length in ((0, 20), *((20 + i, 1) for i in range(8)), (28, 6), (34, 1)):
                with torch.inference_mode():
                    part = tokens[:batch, start : start + length]
                    found.append(model(part, **{CACHE_ARGUMENT: cache}).logits[:, -1].clone())
            cache.crop(-5)
            with torch.no_grad():
                for i in range(5):
                    part = tokens[:batch, 30 + i : 31 + i]
                    found.append(model(part, **{CACHE_ARGUMENT: cache}).logits[:, -1].clone())
            assert cache.get_seq_length() == 35
            assert cache.hata_cache.seq_lens == [35] * batch
        logits.append(found)
    for eager, replayed in zip(*logits, strict=True):
        assert_equal(replayed, eager)


@gpu_only
def test_logits_of_a_pass_stay_what_they_are() -> None:
    model, tokens = make_model("llama-group4", "cuda", DTYPE), random_prompt(1, 40, "cuda")
    cache = switch_on(model, cuda_graphs=True)
    kept, copies = [], []
    with torch.no_grad():
        for part in (tokens[:, :20], *tokens[:, 20:].split(1, 1)):
            kept.append(model(part, **{CACHE_ARGUMENT: cache}).logits)
            copies.append(kept[-1].clone())
    for logits, copied in zip(kept, copies, strict=True):
        assert_equal(logits, copied)


class Waits(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 if x.abs().sum().item() >= 0 else 2.0)


class CountsPasses(torch.nn.Module):
    """What a graph would keep as it was: a number of the host."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x * (1 + self.passes / 8)


@gpu_only
@pytest.mark.parametrize(
    ("module", "reason"), [(Waits, "waits for the device"), (CountsPasses, "other logits")]
)
def test_a_model_that_cannot_be_captured_stays_eager(module: Any, reason: str) -> None:
    def changed() -> PreTrainedModel:
        torch.manual_seed(0)
        model = make_model("llama-group4", "cuda", DTYPE)
        model.model.norm = torch.nn.Sequential(model.model.norm, module())
        return model

    prompt = random_prompt(1, 21, "cuda")
    model = changed()
    switch_on(model, cuda_graphs=False)
    expected = generate(model, prompt, 12)
    model = changed()
    switch_on(model)
    with pytest.warns(UserWarning, match=f"cannot run in CUDA graphs, since .*{reason}"):
        found = generate(model, prompt, 12)
    if module is Waits:
        assert_equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(model, prompt, 12)
    switch_on(model, cuda_graphs=True)
    with pytest.raises(RuntimeError, match=reason):
        generate(model, prompt, 12)


@gpu_only
def test_hooks_see_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make_model("llama-group4", "cuda", DTYPE), random_prompt(1, 21, "cuda")
    switch_on(model, cuda_graphs=True)
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    hook = model.model.layers[1].register_forward_hook(count)
    generate(model, prompt, 12)
    assert calls[0] == 12
    hook.remove()
    with replays_counted(monkeypatch) as replays:
        generate(model, prompt, 12)
    assert replays[0] > 0


@gpu_only
def test_a_copied_model_has_graphs_of_its_own() -> None:
    model, prompt = make_model("llama-group4", "cuda", DTYPE), random_prompt(1, 21, "cuda")
    switch_on(model, cuda_graphs=True)
    text = generate(model, prompt, 12)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_equal(generate(twin, prompt, 12), text)


def test_the_forward_pass_keeps_its_signature_and_comes_back() -> None:
    model = make_model("llama-group4")
    signature = inspect.signature(model.forward)
    switch_on(model)
    assert inspect.signature(model.forward) == signature
    disable(model)
    assert "forward" not in vars(model)
    switch_on(model, cuda_graphs=False)
    assert "forward" not in vars(model)


def test_asking_for_graphs_where_there_can_be_none_is_refused() -> None:
    model = make_model("llama-group4")
    weights = HashWeights.random(**model_shape(model))
    with pytest.raises(ValueError, match="model must be on a GPU for cuda_graphs=True"):
        enable(model, FEW, weights=weights, cuda_graphs=True)
    with pytest.raises(TypeError, match="cuda_graphs must be a bool"):
        enable(model, FEW, weights=weights, cuda_graphs="yes")
    assert "_hata" not in vars(model)
