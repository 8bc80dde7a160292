"""vLLM's engine on a GPU with FlashAttention 3: `pytest tests/test_vllm_cuda.py`, where both are.

bfloat16 rounds otherwise in a batch that is split otherwise, and a text does not come back after
one other token. So every engine is given the same tokens and its log-likelihoods compared: what
hata changes is less than what float8 caches change in vLLM's own attention.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig
from vllm import LLM

from bench.vllm import RANDOM_CACHE
from vllm_engine import (
    BLOCK,
    NUM_LAYERS,
    OBSERVER,
    ON_CPU,
    assert_random,
    attention_layer,
    engine,
    generate,
    hata,
    measured,
    metric,
    observed,
    random_prompts,
    save_llama,
    save_model_with_windows,
)

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(ON_CPU, reason="needs vLLM on a GPU")]

GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8],
    },
}
FORCED = 7  # the token that all answers are made of
KV_CACHE_DTYPES = ["auto", "fp8"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def log_likelihoods(llm: LLM) -> Tensor:
    """Of a given answer to chunked prompts of many lengths, ``[prompts, tokens]``.

    Float8 queries, keys and values have scales.
    """
    if llm.llm_engine.vllm_config.cache_config.cache_dtype == "fp8":
        with torch.inference_mode():  # in which vLLM may have made them
            for layer in (attention_layer(llm, i) for i in range(NUM_LAYERS)):
                layer._q_scale.fill_(0.3)
                layer._k_scale.fill_(0.7)
                layer._v_scale.fill_(0.2)
    answers = generate(
        llm,
        random_prompts(5, 70, 200, 33, 150, 1, 96),
        allowed_token_ids=[FORCED],
        logprobs=0,
    )
    return torch.tensor([[t[FORCED].logprob for t in a.outputs[0].logprobs] for a in answers])


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


@pytest.fixture(scope="module")
def stock(llama: Path) -> dict[str, Tensor]:
    """Log-likelihoods by vLLM's own attention, with each dtype of the cache."""
    found = {}
    for kv_cache_dtype in KV_CACHE_DTYPES:
        own = {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": kv_cache_dtype}
        with engine(llama, **own) as llm:
            found[kv_cache_dtype] = log_likelihoods(llm)
    return found


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_decoding_is_as_near_as_stock_vllms(llama, stock, kv_cache_dtype, graphs):
    """Everything is selected; without graphs codes are checked, and the attention's mass."""
    seen = {} if graphs else {"observer": OBSERVER, "measure_every": 1}
    settings = hata(llama, check=not graphs, **seen) | (GRAPHS if graphs else {})
    observed.clear()
    before = measured()
    with engine(llama, kv_cache_dtype=kv_cache_dtype, **settings) as llm:
        assert type(attention_layer(llm).impl).__module__.endswith(".vllm.cuda")
        found = log_likelihoods(llm)
    of_float8 = distance(stock["fp8"], stock["auto"])
    limit = {"auto": of_float8, "fp8": 1.5 * of_float8}[kv_cache_dtype]
    assert distance(found, stock["auto"]) < limit
    if not graphs:
        steps, mass = measured() - before
        torch.testing.assert_close(mass / steps, torch.ones_like(mass), rtol=1e-2, atol=0)
        assert observed == {1, 2}


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_a_graph_selects_what_other_steps_do(llama, stock, kv_cache_dtype):
    """A small budget, which holds a part of the attention."""
    before = measured()
    with engine(
        llama, kv_cache_dtype=kv_cache_dtype, **hata(llama, top_k=24, measure_every=1)
    ) as llm:
        eager = log_likelihoods(llm)
    steps, mass = measured() - before
    assert 0.05 < mass / steps < 0.99
    settings = hata(llama, top_k=24, check=False) | GRAPHS
    with engine(llama, kv_cache_dtype=kv_cache_dtype, **settings) as llm:
        graphs = log_likelihoods(llm)
    assert distance(graphs, eager) < distance(stock["fp8"], stock["auto"])


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_codes_stay_with_their_keys(llama, kv_cache_dtype):
    """Prefix hits, sampling, and a cache for three of six sequences; codes are checked."""
    settings = {"kv_cache_dtype": kv_cache_dtype, "num_gpu_blocks_override": 1024 // BLOCK}
    with engine(llama, **settings, **hata(llama)) as llm:
        shared = random_prompts(300, seed=1)[0]
        generate(llm, [shared])
        again = generate(llm, [shared + tail for tail in random_prompts(3, 40, seed=2)])
        assert [answer.num_cached_tokens for answer in again] == [300 // BLOCK * BLOCK] * 2
        generate(llm, random_prompts(5, 70, 200, 33), temperature=0.8, top_p=0.9)
        generate(llm, random_prompts(*[200] * 6, seed=4), num_tokens=100)
        assert metric(llm, "vllm:num_preemptions") > 0


@pytest.mark.parametrize(
    ("make_config", "make_model"),
    [(Gemma2Config, Gemma2ForCausalLM), (Gemma3TextConfig, Gemma3ForCausalLM)],
    ids=["capped logits", "windows"],
)
def test_layers_with_a_window_stay_dense(tmp_path, make_config, make_model):
    model = save_model_with_windows(
        tmp_path / "model", make_config, make_model, query_pre_attn_scalar=64
    )
    found, one_pool = [], {"disable_hybrid_kv_cache_manager": True}
    own = {"attention_backend": "FLASH_ATTN"}
    observed.clear()
    for settings in (own, hata(model, num_dense_layers=0, observer=OBSERVER)):
        with engine(model, **one_pool, **settings) as llm:
            found.append(log_likelihoods(llm))
    assert observed == {1, 3}
    assert distance(*found) < 0.05 * found[0].std()


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_random_numbers_take_the_place_of_a_prompt(llama, kv_cache_dtype):
    settings = {"kv_cache_dtype": kv_cache_dtype, "kv_transfer_config": RANDOM_CACHE}
    with engine(llama, **settings, **hata(llama, top_k=24, check=False)) as llm:
        generate(llm, random_prompts(8 * BLOCK))
        assert_random(attention_layer(llm))


def test_speculative_decoding(llama):
    """Drafts from the prompt; the last test, since numba leaves what no engine after it takes."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    ngram |= {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
    prompts = [prompt * 4 for prompt in random_prompts(20, 33, seed=5)] + random_prompts(50)
    with engine(llama, speculative_config=ngram, kv_cache_dtype="fp8", **hata(llama)) as llm:
        generate(llm, prompts)
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
