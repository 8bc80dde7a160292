"""Layers with their own number of bits and their own budget."""

from typing import Any

import pytest
import torch

import hata
from closeness import assert_equal
from hata import HashWeights, HataCache, HataConfig, reference
from hata.integrations.transformers import CACHE_ARGUMENT, enable
from tiny_models import HEAD_DIM, generate, make_model, random_prompt

BITS, ALWAYS = (128, 32, 96), {"num_sink": 2, "num_recent": 4}
CONFIG = HataConfig(
    top_k=(24, 20, 0.4), min_top_k=10, num_dense_layers=0, min_sparse_len=0, **ALWAYS
)
BUDGETS: list[dict[str, Any]] = [
    {"top_k": 24},
    {"top_k": 20},
    {"top_k": 32, "top_k_share": 0.4, "min_top_k": 10},  # 32 of 80, the longest sequence
]
WEIGHTS = HashWeights.random(num_layers=3, num_kv_heads=2, head_dim=HEAD_DIM, num_bits=BITS)


def make_cache(config: HataConfig, device: str, page_size: int | None = None) -> HataCache:
    return HataCache(
        WEIGHTS,
        config,
        batch=2,
        max_seq_len=80,
        page_size=page_size,
        dtype=torch.float16,
        device=device,
    )


@pytest.mark.parametrize("page_size", [None, 16])
def test_each_layer_decodes_with_its_own(device: str, page_size: int | None) -> None:
    cache = make_cache(CONFIG, device, page_size)
    assert [codes.shape[-1] for codes in cache.code_cache] == [4, 1, 3]

    def tokens(q_len: int, num_heads: int) -> torch.Tensor:
        return torch.randn(2, q_len, num_heads, HEAD_DIM).half().to(device)

    prompt, step = ([tokens(n, heads) for heads in (6, 2, 2)] for n in (60, 1))
    for layer_idx in range(3):
        hata.prefill(*prompt, cache, layer_idx)
    for layer_idx in range(3):
        hata.decode_attention(*step, cache, layer_idx)
        _, query_weights = WEIGHTS.layer(layer_idx, cache.dtype, cache.device)
        indices, num_selected = reference.score_select(
            hata.encode_query(step[0], query_weights, query_bits=WEIGHTS.query_bits),
            cache.code_cache[layer_idx],
            cache.norm_cache[layer_idx],
            cache.block_table,
            cache.cache_seqlens,
            weight_sum=15,
            **BUDGETS[layer_idx],
            **ALWAYS,
        )
        assert_equal(cache.last_selection(layer_idx)[0], indices)
        assert_equal(cache.last_selection(layer_idx)[1], num_selected)


def test_a_cache_has_as_many_layers_as_the_config_names(device: str) -> None:
    with pytest.raises(ValueError, match="top_k must be one number or have num_layers=3 entries"):
        make_cache(HataConfig(top_k=(64, 64)), device)


def test_a_model_decodes_with_layers_of_its_own() -> None:
    model, prompt = make_model("llama-group4"), random_prompt(1, 21)
    dense = generate(model, prompt, 10)
    config = HataConfig(top_k=(160, 170, 180), num_dense_layers=0)
    cache = enable(model, config, weights=WEIGHTS, max_seq_len=64)
    assert_equal(generate(model, prompt, 10, **{CACHE_ARGUMENT: cache}), dense)


def test_a_model_decodes_densely_below_min_sparse_len() -> None:
    model, prompt = make_model("llama-group4"), random_prompt(2, 21)
    dense = generate(model, prompt, 10)
    seen = []

    def observe(layer_idx: int, q: object, cache: HataCache, *selection: torch.Tensor) -> None:
        seen.append((selection[0].shape[-1], int(selection[1].max())))

    config = HataConfig(top_k=8, num_sink=1, num_recent=1, num_dense_layers=2, min_sparse_len=29)
    weights = HashWeights.random(num_layers=3, num_kv_heads=2, head_dim=HEAD_DIM, num_bits=64)
    cache = enable(model, config, weights=weights, max_seq_len=64, observer=observe)
    tokens = generate(model, prompt, 8, **{CACHE_ARGUMENT: cache})
    assert_equal(tokens, dense[:, : 21 + 8])
    assert seen == [(n, n) for n in range(22, 29)]
    generate(model, torch.cat([tokens, tokens[:, :1]], 1), 2, **{CACHE_ARGUMENT: cache})
    assert seen[-1] == (8, 8)


def test_the_model_names_its_layers_to_the_config() -> None:
    model = make_model("llama-group4")
    with pytest.raises(ValueError, match="top_k must be one number or have num_layers=3 entries"):
        enable(model, HataConfig(top_k=(64, 64)), weights=WEIGHTS, max_seq_len=64)
