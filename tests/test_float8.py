"""Caches in float8: what is written, what is read, and that scales are factors and nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import LAYOUTS, Caches, make_caches, random_indices, random_vectors
from closeness import (
    assert_equal,
    assert_no_worse_than_pytorch,
    assert_same_caches,
    plain_gather_attention,
)
from decode_cases import make_decode_case
from error_cases import Rejects
from hata import (
    HashWeights,
    HataCache,
    HataConfig,
    cache_append,
    cache_write,
    decode_attention,
    dense_attention,
    encode_query,
    gather_attention,
    hash_encode,
    prefill,
    reference,
)
from hata.integrations.transformers import CACHE_ARGUMENT, disable, enable
from hata.integrations.vllm.code_check import first_wrong_code
from hata.reference.float8 import as_rows
from tiny_models import EVERYTHING, generate, make_model, make_weights, random_prompt

FLOAT8 = torch.float8_e4m3fn


def scales(num_kv_heads: int, device: str) -> dict[str, Tensor]:
    """Of each KV head for keys, and one for all values."""
    return {
        "k_scale": torch.linspace(0.7, 1.9, num_kv_heads, device=device),
        "v_scale": torch.tensor(0.3, device=device),
    }


def dequantized(caches: Caches, dtype: torch.dtype, k_scale: Tensor, v_scale: Tensor) -> Caches:
    """Caches of the keys and values that a float8 cache stands for."""
    k, v = (
        (cache.double() * scale.reshape(-1, 1)).to(dtype)
        for cache, scale in ((caches.k_cache, k_scale), (caches.v_cache, v_scale))
    )
    return replace(caches, k_cache=k, v_cache=v)


def assert_attends(
    q: Tensor, caches: Caches, indices: Tensor, attended: tuple[Tensor, Tensor], **settings: Any
) -> None:
    """FlashAttention's rule for out and lse, over the keys and values that the cache stands for."""
    factors = {name: settings.pop(name) for name in ("k_scale", "v_scale")}
    exact = dequantized(caches, torch.float64, **factors)
    truth = reference.gather_attention(q.double(), *exact.kv, indices, **settings)
    plain = plain_gather_attention(
        q, *dequantized(caches, q.dtype, **factors).kv, indices, **settings
    )
    for actual, plain_one, true_one in zip(attended, plain, truth, strict=True):
        assert_no_worse_than_pytorch(actual, plain_one, true_one)


@pytest.mark.parametrize("new_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["cache_append", "cache_write"])
@pytest.mark.parametrize("scale", [None, 0.37, 2.0**-9])
def test_every_16_bit_value_is_rounded_and_saturates(device, op, new_dtype, scale):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(new_dtype)
    k, key_weights = every.view(1, 512, 2, 64).to(device), torch.zeros(2, 64, 32, dtype=new_dtype)
    caches = make_caches([512], device=device, dtype=FLOAT8, num_bits=32, page_size=512)
    expected, factors = caches.clone(), {}
    if scale is not None:
        factors = {"k_scale": torch.tensor([scale, 1.5]), "v_scale": torch.tensor([scale])}
        factors = {name: t.to(device) for name, t in factors.items()}
    tokens = [k, k.flip(1), key_weights.to(device)]
    if op == "cache_append":
        cache_append(*tokens, *caches.all, **factors)
        reference.cache_append(*tokens, *expected.all, **factors)
    else:
        tokens[:2] = tokens[0][0], tokens[1][0]
        slots = torch.arange(512, device=device).flip(0)
        cache_write(*tokens, *caches.all[:4], slots, **factors)
        reference.cache_write(*tokens, *expected.all[:4], slots, **factors)
    assert_same_caches(caches, expected)


def test_every_float8_value_is_read(device, dtype):
    """As a value where it is all of the attention, and as a key by its logit."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FLOAT8)
    caches = make_caches([300], device=device, dtype=FLOAT8, num_kv_heads=1, head_dim=256)
    page, row = reference.locate(caches.block_table[0], 16, 300)
    caches.k_cache[page, row] = 0.0
    caches.v_cache[page[7], row[7], 0] = every.to(device)
    indices = torch.full((1, 1, 1, 40), -1, dtype=torch.int32, device=device)
    indices[..., 9] = 7
    q = torch.zeros(1, 1, 1, 256, dtype=dtype, device=device)
    v_scale = torch.tensor([0.3], device=device)
    out, _ = gather_attention(q, *caches.kv, indices, v_scale=v_scale)
    assert_equal(out[0, 0, 0], (every.float().to(device) * 0.3).to(dtype))

    numbers = ~every.isnan()
    caches.k_cache[page[:256], row[:256], 0, 0] = every.to(device)
    q[..., 0] = 1
    for t in numbers.nonzero()[::9, 0].tolist():
        indices[..., 9] = t
        _, lse = gather_attention(q, *caches.kv, indices, softmax_scale=1.0, k_scale=v_scale)
        torch.testing.assert_close(
            lse.item(), every[t].float().item() * v_scale.item(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, None])
def test_gather_attention(device, dtype, page_size, layout):
    seq_lens = [153, 1, 0, 64]
    shape = {"page_size": page_size, "layout": layout}
    caches = make_caches(seq_lens, device=device, dtype=FLOAT8, **shape)
    q = random_vectors(4, 2, 6, 64, dtype=dtype, device=device)
    indices = random_indices(seq_lens, 2, 2, 37, device=device)
    factors = scales(2, device)
    attended = gather_attention(q, *caches.kv, indices, **factors)
    assert attended[0].dtype == dtype
    assert_attends(q, caches, indices, attended, **factors)


@pytest.mark.parametrize(
    ("head_dim", "group", "softcap"),
    [(64, 8, None), (96, 1, 3.0), (128, 12, None), (192, 3, None), (256, 2, None), (256, 9, 3.0)],
)
def test_gather_attention_of_any_shape(device, head_dim, group, softcap):
    """With budgets that one block, and that several share."""
    dtype = torch.bfloat16
    caches = make_caches([1300], device=device, dtype=FLOAT8, head_dim=head_dim, page_size=64)
    q = random_vectors(1, 1, 2 * group, head_dim, dtype=dtype, device=device)
    settings = {**scales(2, device), "softcap": softcap}
    for top_k in (50, 1000):
        indices = random_indices([1300], 1, 2, top_k, device=device)
        attended = gather_attention(q, *caches.kv, indices, **settings)
        assert_attends(q, caches, indices, attended, **settings)


@pytest.mark.parametrize(("head_dim", "group", "q_len"), [(64, 3, 1), (128, 4, 5), (256, 2, 2)])
def test_dense_attention(device, dtype, head_dim, group, q_len):
    seq_lens = [300, 1, 0, 33]
    caches = make_caches(seq_lens, device=device, dtype=FLOAT8, head_dim=head_dim)
    q = random_vectors(4, q_len, 2 * group, head_dim, dtype=dtype, device=device)
    factors = scales(2, device)
    everything = torch.arange(300, dtype=torch.int32, device=device).expand(4, q_len, 2, -1)
    attended = dense_attention(q, *caches.kv, **factors)
    assert_attends(q, caches, everything, attended, **factors)


@pytest.mark.parametrize(
    ("head_dim", "group", "q_len", "key_norms"),
    [
        *[(64, 4, 1, True), (96, 4, 1, False), (128, 4, 1, False), (128, 4, 3, True)],
        *[(96, 16, 1, False), (128, 12, 1, True), (192, 2, 1, False), (256, 4, 1, False)],
    ],
)
def test_decode_step(device, algorithm, dtype, head_dim, group, q_len, key_norms):
    """Caches as cache_append leaves them, the selection of unquantized keys, and its attention."""
    case = make_decode_case(
        [153, 8, 0, 400],
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        q_len=q_len,
        group=group,
        key_norms=key_norms,
        top_k=100,
    )
    rows = {name: getattr(case.caches, name).to(FLOAT8) for name in ("k_cache", "v_cache")}
    case = replace(case, caches=replace(case.caches, **rows))
    factors, expected = scales(2, device), case.caches.clone()
    cache_append(case.k, case.v, case.key_weights, *expected.all, **factors)
    result = case.run(**factors)
    assert_same_caches(case.caches, expected)
    settings = dict(case.settings)
    planes = encode_query(case.q, case.query_weights, query_bits=settings.pop("query_bits"))
    chosen = reference.score_select(planes, *expected.codes, weight_sum=15, **settings)
    assert_equal(result.indices, chosen[0])
    assert_equal(result.num_selected, chosen[1])
    assert_attends(case.q, expected, chosen[0], (result.out, result.lse), **factors)


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_the_check_of_codes_knows_what_rounding_does(device, dtype, scale):
    """Keys from those that become 0 to those that saturate; a code that is not the key's."""
    keys = random_vectors(300, 2, 64, dtype=dtype, device=device)
    keys *= torch.logspace(-4, 3, 300, dtype=dtype, device=device)[:, None, None]
    key_weights = random_vectors(2, 64, 64, dtype=dtype, device=device)
    codes = hash_encode(keys[None], key_weights)[0].transpose(0, 1).clone()
    rows = as_rows(keys, FLOAT8, torch.tensor(scale, device=device))
    assert first_wrong_code(rows, codes, key_weights) is None
    codes[150] = codes[149]
    assert first_wrong_code(rows, codes, key_weights) == 150


@pytest.mark.parametrize("op", ["cache_append", "gather_attention", "dense_attention"])
def test_errors(device, op):
    r = Rejects(op, device)
    ones = r.float32(2)
    for name in ("k_scale", "v_scale"):
        r(
            f"{name} must be None beside caches that are not Float8_e4m3fn, got a tensor",
            **{name: ones},
        )
    caches = {name: r.valid[name].to(FLOAT8) for name in ("k_cache", "v_cache")}
    r("v_cache must be Float8_e4m3fn, got Half", k_cache=caches["k_cache"])
    r("k_scale must be Float, got Half", **caches, k_scale=r.half(2))
    r("k_scale must have one element or num_kv_heads=2, got 3", **caches, k_scale=r.float32(3))
    new = "k" if op == "cache_append" else "q"
    floats = "Half, BFloat16 or Float" if device == "cpu" else "Half or BFloat16 on CUDA"
    r(f"{new} must be {floats}, got Float8_e4m3fn", **caches, **{new: FLOAT8})


def test_opcheck(device):
    caches = make_caches([20, 7], device=device, dtype=FLOAT8)
    k = random_vectors(2, 3, 2, 64, dtype=torch.float16, device=device)
    tokens = (k, k.clone(), random_vectors(2, 64, 64, dtype=torch.float16, device=device))
    factors = scales(2, device)
    # In the other checks torch multiplies what an operator is given, which float8 cannot be.
    checks = ("test_faketensor", "test_autograd_registration")
    args = (*tokens, *caches.all)
    torch.library.opcheck(torch.ops.hata.cache_append.default, args, factors, test_utils=checks)
    args = (k, *caches.kv, random_indices([20, 7], 3, 2, 8, device=device))
    torch.library.opcheck(torch.ops.hata.gather_attention.default, args, factors, test_utils=checks)


@pytest.mark.parametrize("page_size", [None, 16])
def test_cache(device, page_size):
    """Decodes and prefills as one of float16 does that holds what the float8 rows stand for."""
    weights = HashWeights.random(num_layers=2, num_kv_heads=2, head_dim=64)
    config = HataConfig(top_k=24, num_dense_layers=1, min_sparse_len=0)
    shape = {"batch": 3, "max_seq_len": 80, "page_size": page_size, "device": device}
    shape["dtype"] = torch.float16
    plain = HataCache(weights, config, **shape)
    small = HataCache(weights, config, **shape, kv_cache_dtype=FLOAT8)
    factors = scales(2, device)
    for layer_idx in (0, 1):
        small.k_scale[layer_idx].copy_(factors["k_scale"])
        small.v_scale[layer_idx].copy_(factors["v_scale"])

    def new(q_len: int) -> tuple[Tensor, ...]:
        heads = (8, 2, 2)
        return tuple(
            random_vectors(3, q_len, n, 64, dtype=torch.float16, device=device) for n in heads
        )

    def rounded(x: Tensor, scale: Tensor) -> Tensor:
        rows = reference.as_rows(x, FLOAT8, scale)
        return (rows.float() * reference.per_head(scale)).half()

    def step(function: Any, q_len: int, layer_idx: int, **settings: Any) -> tuple[Tensor, Tensor]:
        """Of both caches; the float16 one is given what the float8 one holds."""
        q, k, v = new(q_len)
        out = function(q, k, v, small, layer_idx, **settings)
        k, v = rounded(k, factors["k_scale"]), rounded(v, factors["v_scale"])
        return out, function(q, k, v, plain, layer_idx, **settings)

    for layer_idx in (0, 1):  # a first prompt sees its own keys as they came
        step(prefill, 40, layer_idx, new_seqlens=[40, 3, 22])
    # A float16 key with its scale is rounded once more than a float8 one beside its scale.
    close = {"rtol": 1e-2, "atol": 4e-3}
    for layer_idx in (0, 1):
        more = step(prefill, 5, layer_idx, new_seqlens=[0, 5, 3])
        torch.testing.assert_close(*more, **close)
    assert small.k_cache[0].dtype == FLOAT8
    assert_equal(small.keys_values(1, 2)[0], plain.keys_values(1, 2)[0])
    for cache in (plain, small):
        cache.reorder([2, 2, 0])
        cache.truncate([20, 22, 39])
    for _ in range(2):
        torch.testing.assert_close(*step(decode_attention, 1, 0), **close)  # a dense layer
        with pytest.raises(ValueError, match="layer_idx"):
            small.last_selection(0)
        q, k, v = new(1)
        out = decode_attention(q, k, v, small, 1)
        indices, _ = small.last_selection(1)
        cached = replace(
            make_caches([1], device=device),
            k_cache=small.k_cache[1],
            v_cache=small.v_cache[1],
            block_table=small.block_table,
            cache_seqlens=small.cache_seqlens,
        )
        truth = reference.gather_attention(q.double(), *cached.kv, indices, **factors)[0]
        torch.testing.assert_close(out.double(), truth, rtol=2e-3, atol=2e-3)
        plain.append(1, k, v)
    for b in range(3):
        assert_equal(small.keys_values(0, b)[0], plain.keys_values(0, b)[0])


def test_transformers_cache(device, few_spare_rows):
    model = make_model("llama-group4", device, torch.bfloat16)
    prompt = random_prompt(2, 30, device)
    settings = {"output_logits": True, "return_dict_in_generate": True}
    weights = make_weights(model)

    def logits(**choice: Any) -> Tensor:
        cache = enable(model, EVERYTHING, weights=weights, page_size=16, **choice)
        out = generate(model, prompt, 4, **{CACHE_ARGUMENT: cache}, **settings)
        kept = cache.hata_cache
        assert {kept.k_cache[0].dtype, kept.v_cache[2].dtype} == {
            choice.get("kv_cache_dtype", kept.dtype)
        }
        disable(model)
        return torch.stack(out.logits)

    exact, rounded = logits(), logits(kv_cache_dtype=FLOAT8)
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(rounded[0], exact[0]).min() > 0.99
