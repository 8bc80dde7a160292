"""Tiny random models of the supported families, on any device."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hata import HashWeights, HataConfig

NUM_LAYERS, HEAD_DIM, VOCABULARY, POSITIONS = 3, 64, 97, 160
# Sparse at any length, as the default is not on CUDA.
EVERYTHING = HataConfig(top_k=POSITIONS, num_dense_layers=1, min_sparse_len=0)
FEW = HataConfig(top_k=12, num_sink=2, num_recent=4, num_dense_layers=1, min_sparse_len=0)

# name: model class, config class, num_heads, num_kv_heads
MODELS: dict[str, tuple[Any, Any, int, int]] = {
    "llama-group1": (LlamaForCausalLM, LlamaConfig, 2, 2),
    "qwen2-group3": (Qwen2ForCausalLM, Qwen2Config, 3, 1),
    "llama-group4": (LlamaForCausalLM, LlamaConfig, 8, 2),
    "mistral": (MistralForCausalLM, MistralConfig, 4, 2),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, 4, 1),
}


def make_model(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    model_class, config_class, num_heads, num_kv_heads = MODELS[name]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": num_heads * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": POSITIONS,
        "sliding_window": None,
        **changes,
    }
    return model_class(config_class(**settings)).to(device, dtype).eval()


def make_weights(model: PreTrainedModel, num_bits: int = 64) -> HashWeights:
    num_kv_heads = model.config.num_key_value_heads
    return HashWeights.random(
        num_layers=NUM_LAYERS, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, num_bits=num_bits
    )


def random_prompt(batch: int, length: int, device: str = "cpu") -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length)).to(device)


def generate(model: PreTrainedModel, prompt: Tensor, num_tokens: int, **settings: Any) -> Tensor:
    """``num_tokens`` new tokens, greedily and to the last unless the settings say otherwise."""
    return model.generate(
        prompt,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        **{
            "attention_mask": torch.ones_like(prompt),
            "eos_token_id": None,
            "do_sample": False,
            **settings,
        },
    )
