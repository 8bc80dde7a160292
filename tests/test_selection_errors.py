"""Each error message of scoring, selection, attention and the whole step once."""

import pytest
import torch

import hata
from devices import ALGORITHMS, algorithms, gpu_only
from error_cases import Rejects

MAX = 2**31 - 1


@pytest.mark.parametrize("op", ["hamming_score", "score_select"])
def test_planes(device, op):
    r = Rejects(op, device)
    for weight_sum in (-1, 0, 256):
        r(f"weight_sum must be in 1..255, got {weight_sum}", weight_sum=weight_sum)
    r("planes must be Int, got Long", planes=torch.int64)
    r(
        "planes must have shape [batch=2, q_len, num_kv_heads=2, num_planes=3, num_words=2], "
        "got [2, 1, 2, 4, 2]",
        weight_sum=7,
    )
    r("planes must be contiguous, got other strides", planes=r.int32(2, 1, 2, 4, 4)[..., ::2])
    r(
        "num_words must be in 1..8, got 9",
        planes=r.int32(2, 1, 2, 4, 9),
        code_cache=r.int32(8, 2, 16, 9),
    )
    r(
        "code_cache must have shape [num_pages, num_kv_heads, page_size, num_words], "
        "got [8, 2, 16, 2, 1]",
        code_cache=r.int32(8, 2, 16, 2, 1),
    )


def test_hamming_score(device):
    r = Rejects("hamming_score", device)
    for max_seq_len in (-1, 2**31):
        r(f"max_seq_len must be in 0..{MAX}, got {max_seq_len}", max_seq_len=max_seq_len)


@pytest.mark.parametrize("op", ["select_topk", "score_select", "decode_step"])
def test_top_k(device, op):
    r = Rejects(op, device)
    for top_k in (-5, 0, 2**31, 2**40):
        r(f"top_k must be in 1..{MAX}, got {top_k}", top_k=top_k)


@pytest.mark.parametrize("op", ["select_topk", "score_select", "decode_step"])
def test_sink_and_recent(device, op):
    r = Rejects(op, device)
    for name in ("num_sink", "num_recent"):
        for value in (-1, 2**31):
            r(f"{name} must be in 0..{MAX}, got {value}", **{name: value})
    r("num_sink + num_recent must be at most top_k=8, got 9", num_sink=5, num_recent=4)


@pytest.mark.parametrize("op", ["select_topk", "score_select", "decode_step"])
def test_share(device, op):
    r = Rejects(op, device)
    for share in (0, 1, -0.5, 1.5, float("nan")):
        number = f"{share:g}"
        r(f"top_k_share must be above 0 and below 1, got {number}", top_k_share=share)
    r("min_top_k must come with top_k_share, got 4", min_top_k=4)
    for least in (0, 9):
        r(f"min_top_k must be in 1..8, got {least}", top_k_share=0.5, min_top_k=least)
    r("num_sink + num_recent must be at most min_top_k=2, got 3", top_k_share=0.5, min_top_k=2)


def test_select_topk(device):
    r = Rejects("select_topk", device)
    r("scores must be Int, Half or Float, got Long", scores=torch.int64)
    r(
        "scores must have shape [batch, q_len, num_kv_heads, max_seq_len], got [1, 2, 48]",
        scores=r.int32(1, 2, 48),
    )
    r(
        "scores must be contiguous in its last dimension, got stride 2 in dimension 3",
        scores=r.strided("scores"),
    )
    r("cache_seqlens must be Int, got Long", cache_seqlens=torch.int64)
    r("cache_seqlens must have shape [batch=2], got [3]", cache_seqlens=r.int32(3))
    r("cache_seqlens must be contiguous, got other strides", cache_seqlens=r.int32(4)[::2])
    if device == "cpu":
        for value in (-1, 49):
            r(
                f"cache_seqlens must be in 0..48 (the width of scores), got {value} for sequence 1",
                cache_seqlens=torch.tensor([40, value], dtype=torch.int32),
            )


def test_algorithm(device, monkeypatch):
    """The error lists the algorithms: ALGORITHMS in devices.py must have them all."""
    r = Rejects("score_select", device)
    monkeypatch.setenv("HATA_SCORE_SELECT", "fastest")
    *names, last = ALGORITHMS
    known = f"{', '.join(names)} or {last}"
    r(f"environment variable HATA_SCORE_SELECT must be {known}, got fastest")


@pytest.mark.skipif("cluster" not in algorithms("cuda"), reason="this GPU has no clusters")
@gpu_only
@pytest.mark.parametrize("forced", ["cluster", "candidates", "grid"])
def test_a_cluster_takes_eight_query_tokens(monkeypatch, forced):
    arguments = Rejects("score_select", "cuda").valid
    arguments["planes"] = arguments["planes"].expand(-1, 9, -1, -1, -1).contiguous()
    monkeypatch.setenv("HATA_SCORE_SELECT", forced)
    with pytest.raises(RuntimeError, match="hata::score_select: clusters need sm_90"):
        hata.score_select(**arguments)


@pytest.mark.parametrize("op", ["gather_attention", "dense_attention"])
def test_queries_of_attention(device, op):
    r = Rejects(op, device)
    r("q must be Half, got BFloat16", q=torch.bfloat16)
    for shape in ((3, 1, 6, 64), (2, 1, 6, 96)):
        r(
            "q must have shape [batch=2, q_len, num_heads, head_dim=64], "
            f"got [{', '.join(map(str, shape))}]",
            q=r.half(*shape),
        )
    r(
        "q must be contiguous in its last dimension, got stride 2 in dimension 3",
        q=r.strided("q"),
    )
    for num_heads in (0, 5):
        message = f"num_heads must be a multiple of num_kv_heads=2, got {num_heads}"
        r(message, q=r.half(2, 1, num_heads, 64))
    for value in (float("inf"), float("nan")):
        r(f"softmax_scale must be finite, got {value}", softmax_scale=value)
    for value in (0, -1, float("inf")):
        r(f"softcap must be above 0 and finite, got {value}", softcap=value)


def test_fetch_rows(device):
    r = Rejects("fetch_rows", device)
    r(
        "indices must have shape [batch=2, 1=1, num_kv_heads=2, top_k], got [2, 2, 2, 8]",
        indices=r.int32(2, 2, 2, 8),
    )
    r(
        "k_rows must have shape [batch=2, num_slots, num_kv_heads=2, head_dim=64], got [2, 9, 64]",
        k_rows=r.half(2, 9, 64),
    )
    r("num_slots must be in 8..1048576, got 7", k_rows=r.half(2, 7, 2, 64))
    r(
        "v_rows must have shape [batch=2, num_slots=9, num_kv_heads=2, head_dim=64], "
        "got [2, 7, 2, 64]",
        v_rows=r.half(2, 7, 2, 64),
    )
    r("v_rows must be Half, got BFloat16", v_rows=torch.bfloat16)
    for name, dims, dtype in (
        ("slot_of_row", "num_pages=8, num_kv_heads=2, page_size=16", torch.int32),
        ("position_of_slot", "batch=2, num_kv_heads=2, num_slots=9", torch.int32),
        ("referenced", "batch=2, num_kv_heads=2, num_slots=9", torch.uint8),
        ("hand", "batch=2, num_kv_heads=2", torch.int32),
        ("slots", "batch=2, 1=1, num_kv_heads=2, top_k=8", torch.int32),
        ("missing", "batch=2, 1=1, num_kv_heads=2, top_k=8", torch.int32),
        ("num_missing", "batch=2, num_kv_heads=2", torch.int32),
    ):
        wrong = torch.zeros(5, dtype=dtype, device=device)
        r(f"{name} must have shape [{dims}], got [5]", **{name: wrong})
    r("hand must be contiguous, got other strides", hand=r.strided("hand"))


def test_gather_attention(device):
    r = Rejects("gather_attention", device)
    r("indices must have 4 dimensions, got 3", indices=r.int32(2, 1, 8))
    r("indices must be Int, got Long", indices=torch.int64)
    r(
        "indices must have shape [batch=2, q_len=1, num_kv_heads=2, top_k], got [2, 1, 6, 8]",
        indices=r.int32(2, 1, 6, 8),
    )
    r("indices must be contiguous, got other strides", indices=r.strided("indices"))


def test_dense_attention(device):
    r = Rejects("dense_attention", device)
    for number in (-1, 2**31):
        rule = "min_sparse_len must be in 0..2147483647"
        r(f"{rule}, got {number}", min_sparse_len=number)
    out, lse = r.half(2, 1, 6, 64), r.float32(2, 1, 6)
    r("out must be Half, got BFloat16", out=out.bfloat16())
    r(
        "out must have shape [batch=2, q_len=1, num_heads=6, head_dim=64], got [2, 1, 64, 6]",
        out=out.mT,
    )
    r("out must be contiguous, got other strides", out=r.half(2, 1, 6, 128)[..., ::2])
    r("lse must be Float, got Half", lse=lse.half())
    r("lse must have shape [batch=2, q_len=1, num_heads=6], got [2, 6]", lse=lse[:, 0])
    r("lse must be contiguous, got other strides", lse=r.float32(2, 1, 12)[..., ::2])


def test_workspace(device):
    r = Rejects("decode_step", device)
    size = hata.workspace_size(2, 1, 6, 2, 64, 48, 8)
    r("workspace must be Byte, got Int", workspace=r.int32(size))
    wide = r.workspace(2 * size).view(2, size)
    r(f"workspace must have shape [size], got [2, {size}]", workspace=wide)
    r("workspace must be contiguous, got other strides", workspace=r.workspace(2 * size)[::2])
    r(
        "workspace must start at a multiple of 16 bytes, got another offset",
        workspace=r.workspace(size + 8)[8:],
    )
    for given in (0, size - 1):
        r(
            f"workspace must have at least {size} bytes, got {given}",
            workspace=r.workspace(given),
        )


@pytest.mark.parametrize("value", [-1, 2**31])
def test_workspace_size(value):
    sizes = ("batch", "q_len", "num_heads", "num_kv_heads", "head_dim", "max_seq_len", "top_k")
    for name in sizes:
        message = f"hata::workspace_size: {name} must be in 0..{MAX}, got {value}"
        with pytest.raises(RuntimeError, match=message):
            hata.workspace_size(**{**dict.fromkeys(sizes, 1), name: value})


def test_decode_step(device):
    r = Rejects("decode_step", device)
    r("q must be Half, got BFloat16", q=torch.bfloat16)
    r(
        "q must have shape [batch=2, q_len, num_heads, head_dim=64], got [3, 1, 6, 64]",
        q=r.half(3, 1, 6, 64),
    )
    r(
        "q must have shape [batch=2, q_len, num_heads, head_dim=64], got [6, 64]",
        q=r.half(6, 64),
    )
    r("k must be Half, got BFloat16", k=torch.bfloat16)
    r(
        "k must have shape [batch=2, q_len, num_kv_heads=2, head_dim=64], got [2, 64]",
        k=r.half(2, 64),
    )
    r(
        "k must have shape [batch=2, q_len=2, num_kv_heads=2, head_dim=64], got [2, 1, 2, 64]",
        q=r.half(2, 2, 6, 64),
    )
    r("v must be Half, got BFloat16", v=torch.bfloat16)
    r("query_bits must be in 1..4, got 5", query_bits=5)
    for name in ("key_weights", "query_weights"):
        r(f"{name} must be Half, got BFloat16", **{name: torch.bfloat16})
    r(
        "query_weights must have as many bits as key_weights, got 96",
        query_weights=r.half(2, 64, 96),
    )


def test_decode_step_outputs(device):
    r = Rejects("decode_step", device)
    heads = "batch=2, q_len=1, num_heads=6"
    kv_heads = "batch=2, q_len=1, num_kv_heads=2"
    r("indices must be Int, got Half", indices=r.half(2, 1, 2, 8))
    r(
        f"indices must have shape [{kv_heads}, min(top_k, capacity)=8], got [2, 1, 2, 9]",
        indices=r.int32(2, 1, 2, 9),
    )
    r(
        f"indices must have shape [{kv_heads}, min(top_k, capacity)=48], got [2, 1, 2, 50]",
        top_k=50,
        indices=r.int32(2, 1, 2, 50),
    )
    r("indices must be contiguous, got other strides", indices=r.int32(2, 1, 2, 16)[..., ::2])
    r("num_selected must be Int, got Half", num_selected=r.half(2, 1, 2))
    r(
        f"num_selected must have shape [{kv_heads}], got [2, 1, 3]",
        num_selected=r.int32(2, 1, 3),
    )
    r("num_selected must be contiguous, got other strides", num_selected=r.int32(2, 1, 4)[..., ::2])
    r("last_score must be Half, got Int", last_score=r.int32(2, 1, 2))
    r("last_score must be Int, got Half", norm_cache=None, last_score=r.half(2, 1, 2))
    r("last_score must be contiguous, got other strides", last_score=r.half(2, 1, 4)[..., ::2])
    r("num_ties must be Int, got Half", num_ties=r.half(2, 1, 2))
    r(f"num_ties must have shape [{kv_heads}], got [2, 1, 3]", num_ties=r.int32(2, 1, 3))
    r("num_ties must be contiguous, got other strides", num_ties=r.int32(2, 1, 4)[..., ::2])
    r("out must be Half, got Float", out=r.float32(2, 1, 6, 64))
    r(f"out must have shape [{heads}, head_dim=64], got [2, 1, 5, 64]", out=r.half(2, 1, 5, 64))
    r("out must be contiguous, got other strides", out=r.half(2, 1, 6, 128)[..., ::2])
    r("lse must be Float, got Half", lse=r.half(2, 1, 6))
    r(f"lse must have shape [{heads}], got [2, 1, 5]", lse=r.float32(2, 1, 5))
    r("lse must be contiguous, got other strides", lse=r.float32(2, 1, 12)[..., ::2])
