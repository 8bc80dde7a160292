"""Tiny random models of the families that ``docs/models.md`` lists; run it to print the table."""

from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedModel

VOCABULARY, POSITIONS = 97, 128

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOW = {"sliding_window": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_MIXED = [_SLIDING, _FULL, _SLIDING]
# Logits large enough to be capped, which those of the default initialization are not. By "sdpa",
# the default of transformers 5.17, they are not capped at all.
_CAPPED = {
    "attn_logit_softcapping": 2.0,
    "initializer_range": 0.2,
    "query_pre_attn_scalar": 32,
    "attn_implementation": "eager",
}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    **_WINDOW,
}
_GEMMA_3N = {
    **_SHARED_KEYS,
    "intermediate_size": [64] * 4,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: What people call it.
        model: The transformers class, without "ForCausalLM".
        settings: What makes its tiny config, beside the sizes.
        config: The config's class, where it is not called like the model.
        layers: The tiny model's layers that are hata's; none where the model is refused.
        notes: What the table says: which layers stay the model's own, or why it is refused.
        refusal: Part of the message of a refused model.
    """

    name: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    layers: tuple[int, ...] = (0, 1, 2)
    notes: str = ""
    refusal: str = ""

    def make(self, **changes: Any) -> PreTrainedModel:
        """Makes the tiny model."""
        config_class = getattr(transformers, self.config or f"{self.model}Config")
        config = config_class(**{**_SIZES, **self.settings, **changes})
        return getattr(transformers, f"{self.model}ForCausalLM")(config).eval()


def _refused(name: str, model: str, notes: str, refusal: str, **settings: Any) -> Family:
    return Family(name, model, settings, layers=(), notes=notes, refusal=refusal)


_WINDOWED = "layers with a window attend to all of it"
_STATE = "layers with a state stay the model's own"

FAMILIES = [
    Family("Llama 2, 3; SmolLM2; DeepSeek distillations", "Llama"),
    Family(
        "Llama 4 (text)",
        "Llama4",
        {
            "attention_chunk_size": 16,
            "no_rope_layer_interval": 2,
            "intermediate_size_mlp": 64,
            **_EXPERTS,
        },
        "Llama4TextConfig",
        (1,),
        "layers with chunks attend to all of them",
    ),
    Family("Mistral from 0.2", "Mistral", {"sliding_window": None}),
    _refused(
        "Mistral 0.1", "Mistral", "every layer has a window", "got sliding_window=16", **_WINDOW
    ),
    Family(
        "Ministral", "Ministral", {**_WINDOW, "layer_types": _MIXED}, layers=(1,), notes=_WINDOWED
    ),
    Family("Ministral 3", "Ministral3"),
    Family("Mixtral", "Mixtral", {**_EXPERTS, "sliding_window": None}),
    Family("Qwen 2, 2.5", "Qwen2"),
    Family(
        "Qwen 2 with use_sliding_window",
        "Qwen2",
        {
            **_WINDOW,
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
        layers=(0, 1),
        notes=_WINDOWED,
    ),
    Family("Qwen 3", "Qwen3"),
    Family("Qwen 3 MoE", "Qwen3Moe", {**_EXPERTS, "moe_intermediate_size": 32}),
    Family(
        "Qwen 3 Next",
        "Qwen3Next",
        {
            **_EXPERTS,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            **_LINEAR,
        },
        layers=(3,),
        notes="linear-attention layers stay the model's own",
    ),
    Family(
        "Qwen 3.5 (text)",
        "Qwen3_5",
        {"num_hidden_layers": 4, **_LINEAR},
        "Qwen3_5TextConfig",
        (3,),
        "linear-attention layers stay the model's own",
    ),
    Family("Gemma 1", "Gemma"),
    Family(
        "Gemma 2",
        "Gemma2",
        {**_WINDOW, **_CAPPED},
        layers=(1,),
        notes=f"logits are capped; {_WINDOWED}",
    ),
    Family(
        "VaultGemma",
        "VaultGemma",
        {**_WINDOW, **_CAPPED, "layer_types": _MIXED},
        layers=(1,),
        notes=f"logits are capped; {_WINDOWED}",
    ),
    Family(
        "Gemma 3 (text)",
        "Gemma3",
        {
            **_WINDOW,
            "layer_types": [_SLIDING, _FULL, _SLIDING],
            "query_pre_attn_scalar": 32,
        },
        "Gemma3TextConfig",
        (1,),
        _WINDOWED,
    ),
    Family("Phi 3, 3.5; Phi 4", "Phi3"),
    Family(
        "SmolLM 3",
        "SmolLM3",
        {"no_rope_layer_interval": 2},
        notes="layers without rotary embedding too",
    ),
    Family("OLMo 2", "Olmo2"),
    Family(
        "OLMo 3",
        "Olmo3",
        {
            **_WINDOW,
            "layer_types": [_SLIDING, _SLIDING, _FULL],
        },
        layers=(2,),
        notes=_WINDOWED,
    ),
    Family("Granite 3", "Granite", {"attention_multiplier": 0.1}),
    Family("Cohere Command R", "Cohere"),
    Family(
        "Cohere Command R7B (Cohere 2)",
        "Cohere2",
        {
            **_WINDOW,
            "layer_types": [_SLIDING, _SLIDING, _FULL],
        },
        layers=(2,),
        notes=_WINDOWED,
    ),
    Family("GLM 4", "Glm"),
    Family("GLM 4 0414", "Glm4"),
    Family("Starcoder 2", "Starcoder2", {"sliding_window": None}),
    Family("StableLM 2", "StableLm"),
    Family("EXAONE 4", "Exaone4", {**_WINDOW, "layer_types": _MIXED}, layers=(1,), notes=_WINDOWED),
    Family("GLM 4.5, 4.6", "Glm4Moe", _ROUTED),
    Family("Phi 1, 2", "Phi"),
    Family("Phi 3.5 MoE", "Phimoe", _EXPERTS),
    Family("OLMoE", "Olmoe", _EXPERTS),
    Family("Granite 3 MoE", "GraniteMoe", _EXPERTS),
    Family("ERNIE 4.5", "Ernie4_5"),
    Family("Seed-OSS", "SeedOss"),
    Family("Hunyuan", "HunYuanDenseV1"),
    Family("Apertus", "Apertus"),
    Family("Nemotron", "Nemotron"),
    Family("Bamba", "Bamba", {"attn_layer_indices": [1], **_MAMBA}, layers=(1,), notes=_STATE),
    Family(
        "Jamba",
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, **_EXPERTS},
        layers=(1,),
        notes=_STATE,
    ),
    Family("LFM 2", "Lfm2", {"layer_types": ["conv", _FULL, "conv"]}, layers=(1,), notes=_STATE),
    Family(
        "Gemma 3n (text)",
        "Gemma3n",
        _GEMMA_3N,
        "Gemma3nTextConfig",
        (1,),
        f"later layers share the keys; {_WINDOWED}",
    ),
    Family(
        "Gemma 4 (text)",
        "Gemma4",
        {**_SHARED_KEYS, "global_head_dim": 512},
        "Gemma4TextConfig",
        (1,),
        f"heads of 512 channels; later layers share the keys; {_WINDOWED}",
    ),
    _refused(
        "Falcon H1",
        "FalconH1",
        "attention and state in one layer",
        "hybrid",
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
    ),
    Family(
        "gpt-oss",
        "GptOss",
        {**_EXPERTS, **_WINDOW, "initializer_range": 0.2},
        layers=(1,),
        notes=f"logits have sinks; {_WINDOWED}",
    ),
    *(
        _refused(name, model, "latent attention (MLA)", "not latent ones", **_LATENT)
        for name, model in (
            ("DeepSeek V2", "DeepseekV2"),
            ("DeepSeek V3, R1", "DeepseekV3"),
            ("DeepSeek V3.2", "DeepseekV32"),
            ("GLM 4.7 Flash", "Glm4MoeLite"),
            ("GLM 5", "GlmMoeDsa"),
            ("MiniCPM 3", "MiniCPM3"),
            ("Youtu-LLM", "Youtu"),
        )
    ),
    _refused("Doge", "Doge", "its mask depends on the values", "must leave its mask as it is"),
    _refused("Diff Llama", "DiffLlama", "the difference of two attentions", "be attended to once"),
    _refused(
        "Mamba 2", "Mamba2", "no attention", "linear_attention", expand=2, num_heads=8, n_groups=1
    ),
]


def table() -> str:
    """The table of ``docs/models.md``."""
    rows = ["| family | transformers class | hata attention |", "|---|---|---|"]
    for family in FAMILIES:
        answer = "yes" if family.layers else "no"
        text = f"{answer}; {family.notes}" if family.layers and family.notes else answer
        text = text if family.layers else f"no: {family.notes}"
        rows.append(f"| {family.name} | `{family.model}ForCausalLM` | {text} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
