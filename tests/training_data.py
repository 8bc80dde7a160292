"""Random queries and keys that a hash can learn from, and what tests of recipes do with them."""

import torch
from torch import Tensor

from hata.selectors import Softmax
from hata.training.data import TrainingData
from hata.training.recipes import Recipe


def make_data(
    *,
    num_layers: int = 2,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    num_sequences: int = 2,
    seq_len: int = 200,
    num_queries: int = 40,
    seed: int = 0,
    device: str = "cpu",
    softcap: float | None = None,
    sinks: bool = False,
) -> TrainingData:
    """Draws layers ``0..num_layers - 1``; queries use the same quarter of the directions."""
    heads = num_layers * num_kv_heads
    fixed = torch.Generator().manual_seed(1234)
    generator = torch.Generator().manual_seed(seed)
    needed = torch.where(torch.arange(head_dim) < head_dim // 4, 2.5, 0.1)
    turned = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=fixed)).Q

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    k = 1.5 * draw(num_sequences, heads, seq_len, head_dim) @ turned
    q = draw(num_sequences, heads, num_queries, group, head_dim) * needed @ turned[:, None]
    positions = torch.stack(
        [
            torch.randperm(seq_len // 2, generator=generator)[:num_queries].sort().values
            for _ in range(num_sequences)
        ]
    )
    layers = tuple(range(num_layers))
    on_device = (x.to(device) for x in (q, k, positions + seq_len // 2))
    sink_logits = draw(heads, group).to(device) if sinks else None
    softmax = Softmax(head_dim**-0.5, softcap, sink_logits)
    return TrainingData(layers, *on_device, softmax, 2, 3)


def trained(recipe: Recipe, data: TrainingData) -> tuple[Tensor, Tensor]:
    """Takes all steps; returns key weights and query weights, ``[heads, head_dim, num_bits]``."""
    fit = recipe.fit(data)
    optimizer = fit.optimizer()
    if optimizer is not None:
        for step in range(recipe.num_steps):
            fit.step(data, optimizer, step)
    key_weights, query_weights = fit.weights()
    return key_weights, key_weights if query_weights is None else query_weights


def dense_attention(data: TrainingData, s: int, row: int, position: int) -> Tensor:
    """One query token's attention, mean over the group: ``[heads, seq_len]``."""
    q, k = data.q[s, :, row], data.k[s]
    softmax = data.softmax
    logits = torch.einsum("hgd,htd->hgt", q, k) * softmax.scale
    if softmax.softcap is not None:
        logits = softmax.softcap * torch.tanh(logits / softmax.softcap)
    logits[..., position + 1 :] = -torch.inf
    if softmax.sink_logits is not None:
        logits = torch.cat([logits, softmax.sink_logits[..., None]], -1)
    return logits.softmax(-1)[..., : data.seq_len].mean(1)
