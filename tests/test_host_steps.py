"""The benchmark's steps that need the host: what they compute is what their names say."""

import pytest
import torch

import hata
from bench import magicpig
from bench.host_steps import HostStep, Hybrid, OnCpu, Staged, parts_of
from bench.magicpig import MIN_COLLISIONS, NUM_RECENT, NUM_SINK, MagicPig
from hata.offload import OffloadedCache

BATCH, SEQ_LEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS = 2, 700, 8, 2, 64, 2
TOP_K, NUM_SLOTS = 48, 96


@pytest.fixture
def cache(device: str) -> OffloadedCache:
    """Random keys and values, a step open."""
    weights = hata.HashWeights.random(
        num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM
    )
    config = hata.HataConfig(top_k=TOP_K, num_dense_layers=0)
    cache = OffloadedCache(
        weights,
        config,
        batch=BATCH,
        max_seq_len=SEQ_LEN + 1,
        host_memory=1 << 28,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        device=device,
    )
    for layer_idx in range(NUM_LAYERS):
        cache.append(layer_idx, *(random_rows(cache, SEQ_LEN, NUM_KV_HEADS) for _ in range(2)))
    return cache


def random_rows(cache: OffloadedCache, q_len: int, num_heads: int) -> torch.Tensor:
    rows = torch.randn(cache.batch, q_len, num_heads, cache.head_dim)
    return rows.to(cache.device, cache.dtype)


def run(step: HostStep, layer_idx: int, *new: torch.Tensor) -> torch.Tensor:
    for name, part in parts_of(step, layer_idx, *new).items():
        if name == "on_host" and step.cache.device.type == "cuda":
            torch.cuda.synchronize()
        result = part()
        if name == "finish":
            out = result
    return out


def tolerance(cache: OffloadedCache) -> dict[str, float]:
    return {"rtol": 0, "atol": 2e-2 if cache.device.type == "cuda" else 1e-5}


@pytest.mark.parametrize("mode", ["cpu", "staged", "hybrid"])
def test_the_host_attends_to_what_the_gpu_selects(cache, mode):
    shared = random_rows(cache, 1, NUM_HEADS)
    queries = [shared + 0.5 * random_rows(cache, 1, NUM_HEADS) for _ in range(4)]
    k, v = (random_rows(cache, 1, NUM_KV_HEADS) for _ in range(2))
    calls = [(layer_idx, q) for q in queries for layer_idx in range(NUM_LAYERS)]
    expected, lengths = [], cache.seq_lens
    for layer_idx, q in calls:
        if layer_idx == 0:
            cache.truncate(lengths)
        expected.append(hata.decode_attention(q, k, v, cache, layer_idx).clone())
    steps = {"cpu": OnCpu, "staged": Staged}
    if mode == "hybrid":
        step = Hybrid(cache, NUM_HEADS, NUM_SLOTS)
    else:
        step = steps[mode](cache, NUM_HEADS)
    for (layer_idx, q), out in zip(calls, expected, strict=True):
        torch.testing.assert_close(run(step, layer_idx, q, k, v), out, **tolerance(cache))
    if mode == "hybrid":
        assert 0 < step.num_missing.float().mean() < TOP_K


def test_magicpig_attends_to_keys_that_share_buckets_and_to_the_window(cache, monkeypatch):
    monkeypatch.setattr(magicpig, "NUM_TABLES", 20)
    monkeypatch.setattr(magicpig, "TABLE_BITS", 5)
    cache.extend(1)
    step = MagicPig(cache, NUM_HEADS)
    q = random_rows(cache, 1, NUM_HEADS)
    k, v = (random_rows(cache, 1, NUM_KV_HEADS) for _ in range(2))
    for layer_idx in range(NUM_LAYERS):
        out = run(step, layer_idx, q, k, v)
        for b in range(BATCH):
            rows = [rows[0].clone() for rows in cache.keys_values(layer_idx, b)]
            for near, new in zip(rows, (k, v), strict=True):
                near[-1] = new[b, 0]
            for head in range(NUM_HEADS):
                key, value = (near[:, head * NUM_KV_HEADS // NUM_HEADS] for near in rows)
                far = key[NUM_SINK:-NUM_RECENT]
                mean = far.float().mean(0).to(far.dtype)
                same = step.buckets_of(far - mean) == step.buckets_of(q[b, 0, head])
                attended = torch.ones(SEQ_LEN + 1, dtype=torch.bool, device=cache.device)
                attended[NUM_SINK:-NUM_RECENT] = same.sum(-1) >= MIN_COLLISIONS
                assert 0 < attended[NUM_SINK:-NUM_RECENT].sum() < len(far) / 4
                logits = key[attended].float() @ q[b, 0, head].float() / HEAD_DIM**0.5
                expected = logits.softmax(0) @ value[attended].float()
                found = out[b, 0, head].float()
                torch.testing.assert_close(found, expected, **tolerance(cache))
