"""vLLM's engine as the tests start it, their models, what they ask it and what they observe.

On a CPU keys and values are float32, and tokens those of other ways to attend; on a GPU bfloat16.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prometheus_client import REGISTRY, CollectorRegistry
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.vllm import ENVIRONMENT

os.environ.update(ENVIRONMENT, VLLM_CPU_OMP_THREADS_BIND="nobind")

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

from hata import HashWeights, save_weights
from hata.integrations.vllm import engine_args

ON_CPU = not torch.cuda.is_available()
BLOCK, MAX_LEN, NUM_LAYERS = 32 if ON_CPU else 16, 512, 3
SHAPE = {"num_layers": NUM_LAYERS, "num_kv_heads": 2, "head_dim": 64}
MB = 2**20


def hash_weights(model: Path) -> Path:
    return model.with_name("hash.safetensors")  # vLLM loads all that lies in the model's folder


def save_llama(folder: Path) -> Path:
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
    LlamaForCausalLM(config).save_pretrained(folder)
    save_weights(hash_weights(folder), HashWeights.random(**SHAPE, num_bits=64))
    return folder


def save_model_with_windows(folder: Path, make_config: Any, make_model: Any, **more: Any) -> Path:
    """A random model with windows in the first and third of four layers, hash weights for two."""
    torch.manual_seed(0)
    config = make_config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.2,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **more,
    )
    make_model(config).save_pretrained(folder)
    weights = HashWeights.random(**{**SHAPE, "num_layers": 2}, num_bits=64)
    save_weights(hash_weights(folder), replace(weights, layers=(1, 3)))
    return folder


OBSERVER = f"{__name__}:observe"
observed: set[int] = set()


def observe(layer_idx: int, indices: Tensor, num_selected: Tensor, cache_seqlens: Tensor) -> None:
    """Everything is selected."""
    assert (num_selected == cache_seqlens[:, None, None]).all()
    observed.add(layer_idx)


def forget_graph_pool() -> None:
    """Lets the next engine's graphs have memory of their own.

    vLLM keeps one pool for the process, which torch gives up with the last graph that has it.
    """
    type(current_platform)._global_graph_pool = None


@contextmanager
def engine(model: Path, **changes: Any) -> Iterator[LLM]:
    settings = {
        "dtype": "float32" if ON_CPU else "bfloat16",
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 96,  # prompts come in chunks, beside sequences that decode
        "max_num_seqs": 8,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": 64 * MB,
        "gpu_memory_utilization": 0.05,  # what must be free
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "disable_log_stats": False,
        **changes,
    }
    with ExitStack() as stack:
        stack.callback(forget_graph_pool)
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


def measured(registry: CollectorRegistry = REGISTRY, layer_idx: int = 1) -> Tensor:
    """How many steps were measured, and the sum of their attention masses."""
    names, labels = ("count", "sum"), {"layer": str(layer_idx)}
    values = [registry.get_sample_value(f"hata:attention_mass_{x}", labels) for x in names]
    return torch.tensor([value or 0 for value in values], dtype=torch.float64)


def assert_random(layer: Any) -> None:
    """Normal keys and values and random bits of codes in the blocks of a prompt."""
    rows, codes = layer.kv_cache[1:8], layer.impl.codes.code_cache[1:8]
    if rows.dtype == torch.uint8:
        rows = rows.view(torch.float8_e4m3fn)
    torch.testing.assert_close(rows.float().std().item(), 1.0, rtol=0.02, atol=0)
    bits = codes[..., None] >> torch.arange(32, dtype=torch.int32, device=codes.device) & 1
    torch.testing.assert_close(bits.float().mean().item(), 0.5, rtol=0.02, atol=0)


def metric(llm: LLM, name: str) -> float:
    return next(m.value for m in llm.get_metrics() if m.name == name)


def attention_layer(llm: LLM, layer_idx: int = 1) -> Any:
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return context[f"model.layers.{layer_idx}.self_attn.attn"]
