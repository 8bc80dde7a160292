"""HashAttention: the bits of its networks, and what training makes them find."""

import pytest
import torch
from torch import Tensor

from hata.selectors import (
    ExactSelector,
    HashAttentionSelector,
    HashNetworks,
    Softmax,
    fit_hash_networks,
    rank,
)

NUM_KV_HEADS, GROUP, HEAD_DIM, SEQ_LEN, NUM_QUERIES = 2, 3, 16, 400, 80
SOFTMAX = Softmax(1.0)
NONE = {"num_sink": 0, "num_recent": 0}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and positions of one sequence, of which four channels alone tell keys apart."""
    spread = torch.tensor([1.0] * 4 + [0.05] * 12)
    k = torch.randn(SEQ_LEN, NUM_KV_HEADS, HEAD_DIM) * spread + 0.5
    q = torch.randn(NUM_QUERIES, NUM_KV_HEADS, 1, HEAD_DIM)
    q = q + 0.3 * torch.randn(NUM_QUERIES, NUM_KV_HEADS, GROUP, HEAD_DIM)
    return q, k, torch.randint(100, SEQ_LEN, (NUM_QUERIES,)).sort().values


def test_scores_count_the_bits_that_agree(device: str) -> None:
    q, k, positions = inputs()
    networks = []
    for _ in range(2):
        sizes = ((HEAD_DIM, 8), (8, 8), (8, 32))
        drawn = [(torch.randn(2, a, b), torch.randn(2, 1, b)) for a, b in sizes]
        networks.append(tuple(drawn))
    selector = HashAttentionSelector((HashNetworks(*networks),))
    assert (selector.num_bits, selector.bytes_per_token(HEAD_DIM)) == (32, 4)
    scores = selector.index(0, k.to(device), SOFTMAX)(q.to(device), positions.to(device)).cpu()

    def bits(network: tuple, x: Tensor, head: int) -> Tensor:
        for i, (weights, bias) in enumerate(network):
            x = (x if i == 0 else x.clamp(min=0)) @ weights[head] + bias[head, 0]
        return x > 0

    for head in range(NUM_KV_HEADS):
        keys = bits(networks[1], k[:, head], head)
        for i in (0, 41):
            queries = bits(networks[0], q[i, head], head)
            agree = (queries[:, None] == keys).sum((0, 2))
            torch.testing.assert_close(scores[i, head], (2 * agree - GROUP * 32).float())


def test_training_finds_what_is_attended_to(device: str) -> None:
    q, k, positions = inputs()
    layer = (q[None], k[None], positions[None], SOFTMAX)
    others, keys, seen = (x.to(device) for x in inputs())
    best = rank(ExactSelector().index(0, keys, SOFTMAX)(others, seen), seen, 40, **NONE)
    hits = []
    for num_steps in (1, 100):
        networks = fit_hash_networks([layer], torch.device(device), num_steps=num_steps, hidden=32)
        again = fit_hash_networks([layer], torch.device(device), num_steps=num_steps, hidden=32)
        assert torch.equal(networks[0].keys[0][0], again[0].keys[0][0]) or device == "cuda"
        score = HashAttentionSelector(networks).index(0, keys, SOFTMAX)
        found = rank(score(others, seen), seen, 40, **NONE)
        hits.append(float((best[..., None] == found[..., None, :]).any(-1).float().mean()))
    assert hits[0] < 0.4
    assert hits[1] > 1.3 * hits[0]


@pytest.mark.parametrize("num_keys", [3, 70])
def test_queries_that_see_little_train_too(num_keys: int) -> None:
    q, k, _ = inputs()
    positions = torch.zeros(1, NUM_QUERIES, dtype=torch.int64)
    softmax = Softmax(1.0, 2.0)
    layer = (q[None], k[None, :num_keys], positions, softmax)
    (networks,) = fit_hash_networks([layer], torch.device("cpu"), num_steps=2, hidden=8)
    for weights, bias in (*networks.queries, *networks.keys):
        assert weights.isfinite().all()
        assert bias.isfinite().all()
