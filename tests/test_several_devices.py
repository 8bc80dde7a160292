"""Models whose layers, or whose heads, lie on several devices."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from closeness import assert_equal
from families import FAMILIES
from forced_decoding import PROMPT, TOP_K, decode
from hata import HashWeights
from hata.integrations import transformers
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import CACHE_ARGUMENT, enable
from hata.integrations.transformers_settings import layers_by_device
from hata.window_attention import Window
from tiny_folder import NUM_LAYERS, save_tiny_llama
from tiny_models import EVERYTHING, FEW, generate, make_model, random_prompt

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_the_layers_of_a_device() -> None:
    first, second = torch.device("cuda", 1), torch.device("cuda", 0)
    assert layers_by_device([first, first]) == ((0, 1),)
    assert layers_by_device([first, second, first]) == ((0, 2), (1,))


@pytest.fixture
def scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers 0 and 2, and layer 1, pretend to lie on different devices."""
    monkeypatch.setattr(transformers, "layers_by_device", lambda devices: ((0, 2), (1,)))


def test_a_device_has_a_cache_of_its_layers(scattered: None) -> None:
    model = make_model("llama-group4")
    weights = HashWeights.random(**model_shape(model))
    cache = enable(model, FEW, weights=weights)
    assert cache.hata_caches == ()
    generate(model, random_prompt(2, 20), 9, **{CACHE_ARGUMENT: cache})
    assert [each.weights.layers for each in cache.hata_caches] == [(0, 2), (1,)]
    assert [each.config.num_dense_layers for each in cache.hata_caches] == [1, 0]
    for each in cache.hata_caches:
        rows = list(each.weights.layers)
        assert_equal(each.weights.key_weights, weights.key_weights[rows])
    cache.crop(-3)
    assert [each.seq_lens for each in cache.hata_caches] == [[25, 25]] * 2
    with pytest.raises(ValueError, match=r"hata_cache must be asked for where .*\['cpu', 'cpu'\]"):
        _ = cache.hata_cache
    cache.reset()
    assert [each.seq_lens for each in cache.hata_caches] == [[0, 0]] * 2


def test_windows_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer pretends to lie on a device of its own."""

    def apart(devices: list[torch.device]) -> tuple[tuple[int, ...], ...]:
        return tuple((row,) for row in range(len(devices)))

    monkeypatch.setattr(transformers, "layers_by_device", apart)
    model = next(family.make() for family in FAMILIES if family.model == "Gemma3")
    prompt = random_prompt(2, 21)
    texts = [generate(model, prompt, 12), generate(model, prompt, 12, num_beams=3)]
    cache = enable(model, EVERYTHING, weights=HashWeights.random(**model_shape(model)))
    assert_equal(generate(model, prompt, 12, **{CACHE_ARGUMENT: cache}), texts[0])
    assert len(cache.hata_caches) == 1
    assert [each.windows for each in cache.window_caches] == [(Window(16),), (Window(16),)]
    assert_equal(generate(model, prompt, 12, num_beams=3), texts[1])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 8}], ids=str)
def test_text_with_several_caches(scattered: None, settings: dict[str, Any]) -> None:
    model, prompt = make_model("llama-group4"), random_prompt(2, 21)
    dense = generate(model, prompt, 12, **settings)
    enable(model, EVERYTHING, weights=HashWeights.random(**model_shape(model)))
    assert_equal(generate(model, prompt, 12, **settings), dense)


@two_gpus
def test_a_model_on_two_gpus_is_the_model_on_one(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": int(i >= NUM_LAYERS // 2) for i in range(NUM_LAYERS)}
    load = AutoModelForCausalLM.from_pretrained
    one = load(folder, dtype=torch.float16, device_map=0)
    logits, selected, _ = decode(one)
    both = load(folder, dtype=torch.float16, device_map=places)
    found, found_selected, cache = decode(both)
    assert [str(each.device) for each in cache.hata_caches] == ["cuda:0", "cuda:1"]
    assert_equal(found, logits)
    assert_equal(found_selected, selected)
    # Two sequences of different lengths, whose padding is known on the first GPU alone.
    prompt = random_prompt(2, 30, "cuda:0")
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert_equal(both.generate(prompt, **settings), one.generate(prompt, **settings))


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=two_gpus)])
def test_tensor_parallel_ranks_hold_their_heads(tmp_path: Path, place: str) -> None:
    folder = save_tiny_llama(tmp_path)
    worker = Path(__file__).parent / "forced_decoding.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if place == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([*torchrun, worker, folder, tmp_path], env=environment, check=True, timeout=300)
    dtype = torch.float16 if place == "cuda" else torch.float32
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place).eval()
    logits, selected, _ = decode(whole)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if place == "cpu" else {"rtol": 0.05, "atol": 0.05}
    for found, _ in ranks:  # of the prompt, which is attended to densely
        torch.testing.assert_close(found[:, 0], logits[:, 0], **tolerance)
    found = torch.cat([indices for _, indices in ranks], dim=3)
    assert found.shape == selected.shape
    if place == "cpu":
        assert_equal(found, selected)
        torch.testing.assert_close(ranks[0][0], logits, **tolerance)
    # Sums over ranks round otherwise, and a key at the cut may give way to another one.
    common = (found[..., :, None] == selected[..., None, :]).sum((-1, -2)).float().mean()
    assert common > 0.9 * TOP_K
    assert found.max() >= PROMPT
