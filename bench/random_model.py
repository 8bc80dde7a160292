"""Models of transformers with random weights, of the shapes of real ones."""

import math
from typing import Any

import torch
import transformers

from hata.checks import check

LLAMA = {"vocab_size": 128256, "max_position_embeddings": 1 << 21, "rope_theta": 5e5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, **LLAMA},
    ),
    "llama-2-7b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, **LLAMA, "vocab_size": 32000},
    ),
    "smollm2-135m": (
        "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, **LLAMA, "vocab_size": 49152},
    ),
    "gemma-3-270m": (
        "gemma3_text",
        {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}
        | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
        | {"vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512},
    ),
}
QUIET = 1e-5  # what is left of what a layer adds to the hidden states


def random_model(name: str, layers: int | None, device: torch.device) -> Any:
    kind, sizes = SHAPES[name]
    config = transformers.AutoConfig.for_model(
        kind, **sizes | ({"num_hidden_layers": layers} if layers else {})
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def share_embeddings(model: Any, similarity: float) -> None:
    """Makes the queries of any two tokens have a cosine, in all layers.

    A token's embedding is one direction that all share and one of its own, layers add next to
    nothing to it, and positions do not turn it; what is computed takes as long as before. The head
    does not see the shared direction, so that greedy text goes on without repeating itself.

    Args:
        model: Of `random_model`; its head has weights of its own. Changed.
        similarity: The cosine, in 0..1.
    """
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    rule = "be left out for a model whose head is its embeddings"
    check(embeddings is not head, "bench", "--similarity", rule, similarity)
    shared = torch.nn.functional.normalize(torch.randn_like(embeddings[0]), dim=0)
    with torch.no_grad():
        embeddings.div_(embeddings.norm(dim=1, keepdim=True)).mul_(math.sqrt(1 - similarity))
        embeddings.add_(math.sqrt(similarity) * shared)
        head.sub_((head @ shared)[:, None] * shared)
        model.model.rotary_emb.inv_freq.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(QUIET)
            layer.mlp.down_proj.weight.mul_(QUIET)
