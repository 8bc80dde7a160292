import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from bench.hit_rate import early_queries
from hata import HashWeights, HataConfig
from hata.integrations.transformers import enable

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
GEMMA = {"sliding_window": 16, "layer_types": KINDS}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Qwen2Config(**SIZES), Qwen2ForCausalLM),
        (Gemma3TextConfig(**SIZES, **GEMMA), Gemma3ForCausalLM),
    ],
)
def test_a_guess_is_the_query_where_the_layer_between_changes_nothing(config, kind):
    torch.manual_seed(0)
    model = kind(config).eval()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        if hasattr(layer.self_attn, "q_norm"):
            torch.nn.init.normal_(layer.self_attn.q_norm.weight)
    asked: list[tuple[Tensor, Tensor]] = []
    early, _ = early_queries(model)

    def keep(layer_idx: int, q: Tensor, *_: object) -> None:
        if model_layers[layer_idx] > 0:
            asked.append((early[model_layers[layer_idx]], q))

    config = HataConfig(top_k=32, num_dense_layers=0, min_sparse_len=0)
    weights = HashWeights.random(num_layers=3, num_kv_heads=2, head_dim=64)
    cache = enable(model, config, weights=weights, max_seq_len=64, observer=keep)
    model_layers = cache.hata_layers
    with torch.inference_mode():
        model.generate(torch.randint(1, 64, (1, 40)), min_new_tokens=4, max_new_tokens=4)
    assert len(asked) >= 3
    for guess, q in asked:
        torch.testing.assert_close(guess, q)
