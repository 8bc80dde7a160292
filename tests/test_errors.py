"""Each error message of the operators once: op, argument, rule and value; and nothing written."""

import pytest
import torch

from devices import gpu_only
from error_cases import Rejects


def test_hash_encode(device):
    r = Rejects("hash_encode", device)
    floats = "Half, BFloat16 or Float" if device == "cpu" else "Half or BFloat16 on CUDA"
    r(f"keys must be {floats}, got Int", keys=torch.int32)
    r(
        "keys must have shape [batch, seq_len, num_kv_heads, head_dim], got [5, 2, 64]",
        keys=r.half(5, 2, 64),
    )
    r(
        "keys must have sizes below 2^31, got [1, 2147483648, 2, 64]",
        keys=r.half(64).expand(1, 2**31, 2, 64),
    )
    r(
        "keys must be contiguous in its last dimension, got stride 2 in dimension 3",
        keys=r.strided("keys"),
    )
    for head_dim in (12, 520) if device == "cpu" else (32, 80, 264):
        rule = "a multiple of 8 in 8..512"
        if device == "cuda":
            rule = "one of 64, 96, 128, 192, 256, 512 on CUDA"
        r(
            f"head_dim must be {rule}, got {head_dim}",
            keys=r.half(2, 5, 2, head_dim),
            key_weights=r.half(2, head_dim, 64),
        )
    r("key_weights must be Half, got BFloat16", key_weights=torch.bfloat16)
    r(
        "key_weights must have shape [num_kv_heads=2, head_dim=64, num_bits], got [3, 64, 64]",
        key_weights=r.half(3, 64, 64),
    )
    r("key_weights must be contiguous, got other strides", key_weights=r.strided("key_weights"))
    for num_bits in (0, 72, 288):
        r(
            f"num_bits must be a multiple of 32 in 32..256, got {num_bits}",
            key_weights=r.half(2, 64, num_bits),
        )


def test_encode_query(device):
    r = Rejects("encode_query", device)
    floats = "Half, BFloat16 or Float" if device == "cpu" else "Half or BFloat16 on CUDA"
    r(f"q must be {floats}, got Double", q=torch.float64)
    r(
        "q must have shape [batch, q_len, num_heads, head_dim], got [6, 64]",
        q=r.half(6, 64),
    )
    r(
        "q must be contiguous in its last dimension, got stride 2 in dimension 3",
        q=r.strided("q"),
    )
    for query_bits in (-1, 0, 5, 2**40):
        r(f"query_bits must be in 1..4, got {query_bits}", query_bits=query_bits)
    r("query_weights must have 3 dimensions, got 2", query_weights=r.half(64, 64))
    r("query_weights must be Half, got BFloat16", query_weights=torch.bfloat16)
    r(
        "query_weights must have shape [num_kv_heads=2, head_dim=64, num_bits], got [2, 128, 64]",
        query_weights=r.half(2, 128, 64),
    )
    r("num_heads must be a multiple of num_kv_heads=4, got 6", query_weights=r.half(4, 64, 64))
    r("num_heads must be a multiple of num_kv_heads=0, got 6", query_weights=r.half(0, 64, 64))
    r("num_heads / num_kv_heads must be in 1..255, got 256", q=r.half(1, 1, 512, 64))
    r("num_heads / num_kv_heads must be in 1..255, got 0", q=r.half(1, 1, 0, 64))


@pytest.mark.parametrize(
    "op", ["cache_append", "gather_attention", "dense_attention", "decode_step"]
)
def test_key_and_value_caches(device, op):
    r = Rejects(op, device)
    floats = {
        "cpu": "Half, BFloat16, Float or Float8_e4m3fn",
        "cuda": "Half, BFloat16 or Float8_e4m3fn on CUDA",
    }
    r(f"k_cache must be {floats[device]}, got Long", k_cache=torch.int64)
    r(
        "k_cache must have shape [num_pages, page_size, num_kv_heads, head_dim], "
        "got [2, 16, 2, 2, 64]",
        k_cache=r.half(2, 16, 2, 2, 64),
    )
    r("v_cache must be Half, got BFloat16", v_cache=torch.bfloat16)
    r(
        "v_cache must have shape [num_pages=8, page_size=16, num_kv_heads=2, head_dim=64], "
        "got [7, 16, 2, 64]",
        v_cache=r.valid["v_cache"][1:],
    )
    for name in ("k_cache", "v_cache"):
        r(
            f"{name} must be contiguous in its last dimension, got stride 2 in dimension 3",
            **{name: r.strided(name)},
        )
    for page_size in (0, 12):
        r(
            f"page_size must be a power of two where a sequence has several pages, got {page_size}",
            k_cache=r.half(8, page_size, 2, 64),
            v_cache=r.half(8, page_size, 2, 64),
        )


@pytest.mark.parametrize("op", ["cache_append", "hamming_score", "score_select", "decode_step"])
def test_code_cache(device, op):
    r = Rejects(op, device)
    r("code_cache must be Int, got Long", code_cache=torch.int64)
    r(
        "code_cache must be contiguous in its last 2 dimensions, got stride 16 in dimension 3",
        code_cache=r.int32(8, 2, 2, 16).transpose(2, 3),
    )
    r(
        "code_cache must start each head of a page at a multiple of 8 bytes, "
        "got other strides or offset",
        code_cache=r.int32(8 * 2 * 16 * 2 + 1)[1:].view(8, 2, 16, 2),
    )
    r("norm_cache must be Half, got Float", norm_cache=torch.float32)
    r(
        "norm_cache must have shape [num_pages=8, num_kv_heads=2, page_size=16], got [8, 2, 17]",
        norm_cache=r.half(8, 2, 17),
    )
    r(
        "norm_cache must be contiguous in its last dimension, got stride 2 in dimension 2",
        norm_cache=r.half(8, 2, 32)[..., ::2],
    )


@pytest.mark.parametrize(
    "op",
    [
        "cache_append",
        "hamming_score",
        "score_select",
        "gather_attention",
        "dense_attention",
        "decode_step",
    ],
)
def test_page_table(device, op):
    r = Rejects(op, device)
    r("block_table must be Int, got Long", block_table=torch.int64)
    r("block_table must have shape [batch, max_pages], got [2, 3, 1]", block_table=r.int32(2, 3, 1))
    r(
        "block_table must be contiguous in its last dimension, got stride 2 in dimension 1",
        block_table=r.strided("block_table"),
    )
    r("cache_seqlens must be Int, got Long", cache_seqlens=torch.int64)
    r("cache_seqlens must have shape [batch=2], got [1]", cache_seqlens=r.int32(1))
    r("cache_seqlens must be contiguous, got other strides", cache_seqlens=r.int32(4)[::2])
    if device == "cuda":
        return
    for value in (-1, 49):
        r(
            f"cache_seqlens must be in 0..48 (the capacity), got {value} for sequence 1",
            cache_seqlens=torch.tensor([40, value], dtype=torch.int32),
        )
    for page in (-1, 8):
        table = r.valid["block_table"].clone()
        table[0, 2] = page
        r(
            f"block_table must name one of the 8 pages, got {page} for page 2 of sequence 0",
            block_table=table,
        )


def test_capacity(device):
    r = Rejects("gather_attention", device)
    rows = r.half(64).expand(8, 2**30, 2, 64)
    r(
        "block_table must give each sequence at most 2^31 - 8 positions, got 3 pages of 1073741824",
        k_cache=rows,
        v_cache=rows,
    )


def test_cache_append(device):
    r = Rejects("cache_append", device)
    for name in ("k", "v"):
        r(f"{name} must be Half, got Float", **{name: torch.float32})
        r(
            f"{name} must be contiguous in its last dimension, got stride 2 in dimension 3",
            **{name: r.strided(name)},
        )
    r(
        "k must have shape [batch=2, q_len, num_kv_heads=2, head_dim=64], got [2, 2, 64]",
        k=r.half(2, 2, 64),
    )
    r(
        "v must have shape [batch=2, q_len=1, num_kv_heads=2, head_dim=64], got [2, 2, 2, 64]",
        v=r.half(2, 2, 2, 64),
    )
    r(
        "code_cache must have shape [num_pages=8, num_kv_heads=2, page_size=16, num_words=3], "
        "got [8, 2, 16, 2]",
        key_weights=r.half(2, 64, 96),
    )
    r("key_weights must be Half, got BFloat16", key_weights=torch.bfloat16)
    r("key_weights must be given with code_cache, got None", key_weights=None)
    r("key_weights must be None without code_cache, got a tensor", code_cache=None)
    r("norm_cache must be None without code_cache, got a tensor", key_weights=None, code_cache=None)
    r("new_seqlens must be Int, got Half", new_seqlens=r.half(2))
    r("new_seqlens must have shape [batch=2], got [3]", new_seqlens=r.int32(3))
    r("new_seqlens must be contiguous, got other strides", new_seqlens=r.int32(4)[::2])


def test_cache_write(device):
    r = Rejects("cache_write", device)
    r("k must be Half, got Float", k=torch.float32)
    r(
        "k must have shape [num_tokens, num_kv_heads=2, head_dim=64], got [1, 3, 2, 64]",
        k=r.half(1, 3, 2, 64),
    )
    r(
        "v must have shape [num_tokens=3, num_kv_heads=2, head_dim=64], got [4, 2, 64]",
        v=r.half(4, 2, 64),
    )
    r("v must be contiguous in its last dimension, got stride 2 in dimension 2", v=r.strided("v"))
    r("slot_mapping must be Long, got Int", slot_mapping=torch.int32)
    r(
        "slot_mapping must have shape [num_tokens=3], got [2]",
        slot_mapping=r.valid["slot_mapping"][:2],
    )
    r("slot_mapping must be contiguous, got other strides", slot_mapping=r.strided("slot_mapping"))
    r(
        "page_size must be a power of two, got 12",
        **{name: r.valid[name][:, :12] for name in ("k_cache", "v_cache")},
        **{name: r.valid[name][:, :, :12] for name in ("code_cache", "norm_cache")},
    )
    if device == "cpu":
        slots = torch.tensor([0, 5, 128])
        r(
            "slot_mapping must be below 128 (the capacity), got 128 for token 2",
            slot_mapping=slots,
        )


def test_merge_attention_states(device):
    r = Rejects("merge_attention_states", device)
    r("out_b must be Half, got BFloat16", out_b=torch.bfloat16)
    r("lse_a must be Float, got Half", lse_a=torch.float16)
    r(
        "out_a must have shape [batch, q_len, num_heads, head_dim], got [6, 64]",
        out_a=r.half(6, 64),
    )
    shape = "[batch=2, q_len=1, num_heads=6, head_dim=64]"
    r(f"out_b must have shape {shape}, got [2, 1, 5, 64]", out_b=r.half(2, 1, 5, 64))
    for name in ("lse_a", "lse_b"):
        r(
            f"{name} must have shape [batch=2, q_len=1, num_heads=6], got [2, 1, 7]",
            **{name: r.float32(2, 1, 7)},
        )
    for name in ("out_a", "lse_a", "out_b", "lse_b"):
        r(f"{name} must be contiguous, got other strides", **{name: r.strided(name)})


@gpu_only
def test_mixed_devices():
    for op, first in (
        ("hash_encode", "keys"),
        ("encode_query", "q"),
        ("cache_append", "k"),
        ("cache_write", "k"),
        ("hamming_score", "planes"),
        ("select_topk", "scores"),
        ("score_select", "planes"),
        ("gather_attention", "q"),
        ("dense_attention", "q"),
        ("merge_attention_states", "out_a"),
        ("decode_step", "q"),
    ):
        r = Rejects(op, "cuda")
        for name, t in r.valid.items():
            if isinstance(t, torch.Tensor) and name != first:
                message = f"{name} must be on the device of {first} (cuda:0), got cpu"
                r(message, **{name: t.cpu()})


@gpu_only
@pytest.mark.parametrize("name", ["keys", "key_weights"])
def test_rows_are_aligned_on_cuda(name):
    r = Rejects("hash_encode", "cuda")
    shape = r.valid[name].shape
    shifted = r.half(r.valid[name].numel() + 1)[1:].view(shape)
    r(
        f"{name} must have rows that start at multiples of 16 bytes, got other strides or offset",
        **{name: shifted},
    )


@gpu_only
def test_float32_is_for_the_cpu():
    r = Rejects("hash_encode", "cuda")
    r("keys must be Half or BFloat16 on CUDA, got Float", keys=torch.float32)
