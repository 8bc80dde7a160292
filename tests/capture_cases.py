"""Tiny random captures: what `hata capture` would write for a model of two layers."""

from pathlib import Path

import torch

from hata.training.captures import FULL_ATTENTION, CaptureInfo, Captures, CaptureWriter

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SEQ_LEN, NUM_QUERIES = 3, 6, 2, 32, 200, 7
SHAPE = {"num_layers": NUM_LAYERS, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM}


def make_captures(
    folder: Path,
    *,
    dtype: str = "float32",
    values: bool = True,
    num_sequences: int = 2,
    layer_types: tuple[str, ...] = (FULL_ATTENTION,) * NUM_LAYERS,
    softcap: float | None = None,
    sinks: bool = False,
) -> Captures:
    """Keys and queries that lean to a few directions, as a model's do."""
    info = CaptureInfo(
        model="tiny",
        num_heads=NUM_HEADS,
        softmax_scale=HEAD_DIM**-0.5,
        seq_len=SEQ_LEN,
        num_queries=NUM_QUERIES,
        dtype=dtype,
        seed=0,
        has_values=values,
        texts=tuple(f"text {i}" for i in range(num_sequences)),
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        layer_types=layer_types,
        softcap=softcap,
    )
    writer = CaptureWriter(folder, info)
    spread = torch.linspace(3.0, 0.1, HEAD_DIM)
    sink_logits = 3 * torch.randn(info.num_layers, NUM_KV_HEADS, info.group)
    for sequence_idx in range(num_sequences):
        positions = (torch.randperm(SEQ_LEN // 2)[:NUM_QUERIES] + SEQ_LEN // 2).sort().values
        for layer_idx in range(info.num_layers):
            k, v = (torch.randn(SEQ_LEN, NUM_KV_HEADS, HEAD_DIM) * spread for _ in range(2))
            q = torch.randn(NUM_QUERIES, NUM_HEADS, HEAD_DIM) * spread
            q, k, v = (x.to(getattr(torch, dtype)) for x in (q, k, v))
            writer.write(
                *(sequence_idx, layer_idx),
                q=q,
                k=k,
                v=v if values else None,
                positions=positions,
                sink_logits=sink_logits[layer_idx] if sinks else None,
            )
    return Captures.open(folder)
