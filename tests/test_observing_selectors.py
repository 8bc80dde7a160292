"""Selectors that go by earlier queries, by foreseen ones, or draw: scores and selections."""

import pytest
import torch
from torch import Tensor

from closeness import assert_equal
from hata.selectors import (
    ExactSelector,
    H2oSelector,
    InfinigenSelector,
    Queries,
    QuestSelector,
    Selection,
    SnapkvSelector,
    Softmax,
    VattentionSelector,
    rank,
)
from hata.selectors.quality import DenseAttention

NUM_KV_HEADS, GROUP, HEAD_DIM, SEQ_LEN = 2, 3, 16, 60
SOFTMAX = Softmax(0.3)
SINKS = {"num_sink": 2, "num_recent": 3}


def inputs(device: str) -> tuple[Queries, Tensor, Tensor]:
    """Queries at 30 positions, keys, and which of the queries are scored."""
    positions = torch.randperm(SEQ_LEN)[:30].sort().values
    q = torch.randn(30, NUM_KV_HEADS, GROUP, HEAD_DIM)
    k = torch.randn(SEQ_LEN, NUM_KV_HEADS, HEAD_DIM)
    scored = torch.tensor([0, 3, 17, 28, 29])
    return Queries(q.to(device), positions.to(device)), k.to(device), scored.to(device)


def shares_of(queries: Queries, k: Tensor) -> Tensor:
    """``[num_queries, num_kv_heads, seq_len]``, float64 on the CPU: mean over a group's heads."""
    shares = torch.zeros(len(queries.q), NUM_KV_HEADS, SEQ_LEN, dtype=torch.float64)
    for i, last in enumerate(queries.positions.tolist()):
        for h in range(NUM_KV_HEADS):
            logits = k[: last + 1, h].double().cpu() @ queries.q[i, h].double().cpu().T * 0.3
            shares[i, h, : last + 1] = logits.softmax(0).mean(1)
    return shares


def test_snapkv_lets_the_last_queries_vote(device: str) -> None:
    queries, k, scored = inputs(device)
    shares, selector = shares_of(queries, k), SnapkvSelector(window=4, num_neighbors=5)
    positions = queries.positions[scored]
    scores = selector.index(0, k, SOFTMAX, queries)(queries.q[scored], positions)
    for i, row in enumerate(scored.tolist()):
        votes = shares[max(row - 4, 0) : row].sum(0)
        last = int(positions[i])
        for t in range(last - 3):
            best = votes[:, max(t - 2, 0) : t + 3].amax(1)
            torch.testing.assert_close(scores[i, :, t].double().cpu(), best, rtol=1e-4, atol=1e-7)
        assert (scores[i, :, max(last - 3, 0) : last + 1] == torch.inf).all()


def test_h2o_adds_up_all_attention_and_keeps_half_of_it_recent(device: str, monkeypatch) -> None:
    queries, k, scored = inputs(device)
    shares, positions = shares_of(queries, k), queries.positions[scored]
    selector = H2oSelector()
    score = selector.index(0, k, SOFTMAX, queries)
    scores = score(queries.q[scored], positions)
    expected = torch.stack([shares[:row].sum(0) for row in scored.tolist()])
    torch.testing.assert_close(scores.double().cpu(), expected, rtol=1e-4, atol=1e-7)
    monkeypatch.setattr("hata.selectors.selector._SHARES_AT_ONCE", 1)  # a query at a time
    torch.testing.assert_close(score(queries.q[scored], positions), scores)

    few, many = selector.select(0, scores, positions, [4, 20], **SINKS)
    assert few.indices.shape[-1] == 4
    last = int(positions[-1])
    assert set(range(last - 9, last + 1)) <= set(many.indices[-1, 0].tolist())
    heavy = expected[-1, 0, 2 : last - 9].topk(8).indices + 2
    assert set(heavy.tolist()) <= set(many.indices[-1, 0].tolist())


def test_infinigen_reads_the_channels_that_hold_most_of_the_queries(device: str) -> None:
    queries, k, scored = inputs(device)
    rows, positions = scored[2:], queries.positions[scored[2:]]
    q = queries.q[rows]
    every = InfinigenSelector(HEAD_DIM).index(0, k, SOFTMAX, queries)(q, positions)
    exact = ExactSelector().index(0, k, SOFTMAX)(q, positions)
    torch.testing.assert_close(every, exact, rtol=1e-4, atol=1e-6)

    some = InfinigenSelector(5).index(0, k, SOFTMAX, queries)(q, positions)
    for h in range(NUM_KV_HEADS):
        seen = queries.q[: int(rows[0]), h].flatten(0, 1).double()
        skew = torch.linalg.svd(seen).Vh.T
        skew = skew[:, (seen @ skew).abs().sum(0).topk(5).indices].float()
        logits = torch.einsum("qgd,dc,ec,se->qgs", q[:, h], skew, skew, k[:, h]) * 0.3
        hidden = torch.arange(SEQ_LEN, device=device) > positions[:, None]
        expected = logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1).mean(1)
        torch.testing.assert_close(some[:, h], expected, rtol=1e-3, atol=1e-5)


def test_vattention_draws_for_all_that_is_left(device: str) -> None:
    queries, k, scored = inputs(device)
    positions = queries.positions[scored]
    selector = VattentionSelector(ExactSelector())
    scores = selector.index(0, k, SOFTMAX)(queries.q[scored], positions)
    few, many = selector.select(0, scores, positions, [21, 2 * SEQ_LEN], **SINKS)
    for selection in (few, many):
        for i, last in enumerate(positions.tolist()):
            for h in range(NUM_KV_HEADS):
                held = selection.indices[i, h] >= 0
                found = selection.indices[i, h][held].tolist()
                assert len(found) == len(set(found)) == min(len(held), last + 1)
                # The drawn ones stand for the others, so that all together are what is visible.
                assert float(selection.weights[i, h][held].sum()) == pytest.approx(last + 1)
    best = rank(scores, positions, 13, **SINKS)
    assert_equal(few.indices[..., :13], best)
    assert (few.weights[..., :13] == 1).all()
    alone = selector.select(0, scores[3:4], positions[3:4], [21], **SINKS)[0]
    assert_equal(alone.indices, few.indices[3:4])  # however many are scored at once
    other = selector.select(1, scores, positions, [21], **SINKS)[0]
    assert (other.indices != few.indices).any()  # each layer draws anew


def test_every_position_is_drawn_as_often(device: str) -> None:
    """2000 heads draw 10 of 30 each: 667 a position, with a deviation of 21."""
    positions = torch.tensor([39], device=device)
    selector = VattentionSelector(ExactSelector())
    scores = torch.zeros(1, 2000, 40, device=device)
    (found,) = selector.select(3, scores, positions, [20], num_sink=0, num_recent=0)
    counts = found.indices[..., 10:].flatten().bincount(minlength=40)
    assert counts[30:].sum() == 0  # the most recent are what equal scores select
    drawn = counts[:30].double()
    assert drawn.sum() == 20000
    assert (drawn - 20000 / 30).abs().max() < 5 * 21


def test_weights_count_in_the_output_alone(device: str) -> None:
    queries, k, scored = inputs(device)
    q, positions = queries.q[scored[2:]], queries.positions[scored[2:]]
    v = torch.randn_like(k)
    dense = DenseAttention(q, k, v, positions, SOFTMAX)
    ranks = dense.ranks(rank(dense.mass, positions, 3, num_sink=0, num_recent=0))
    indices = torch.tensor([0, 4, 7], device=device).expand(3, NUM_KV_HEADS, 3)
    weights = torch.tensor([1.0, 2.5, 4.0], device=device).expand_as(indices)
    found = dense.quality([Selection(indices, weights)], ranks, [3])
    plain = dense.quality([Selection(indices)], ranks, [3])
    torch.testing.assert_close(found.attention_mass, plain.attention_mass)
    torch.testing.assert_close(found.recall, plain.recall)
    errors = torch.zeros(NUM_KV_HEADS, dtype=torch.float64)
    for i, last in enumerate(positions.tolist()):
        for h in range(NUM_KV_HEADS):
            for g in range(GROUP):
                logits = k[: last + 1, h].double().cpu() @ q[i, h, g].double().cpu() * 0.3
                values = v[: last + 1, h].double().cpu()
                expected = logits.softmax(0) @ values
                some = (logits[[0, 4, 7]] + torch.tensor([1.0, 2.5, 4.0]).log()).softmax(0)
                error = (some @ values[[0, 4, 7]] - expected).norm() / expected.norm()
                errors[h] += error / GROUP
    torch.testing.assert_close(found.output_error[:, 0].cpu(), errors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapkvSelector(0), "SnapkvSelector: window must be at least 1, got 0"),
        (lambda: SnapkvSelector(1, 4), "SnapkvSelector: num_neighbors must be odd, got 4"),
        (lambda: VattentionSelector(QuestSelector()), "top must select single positions .* quest"),
        (lambda: VattentionSelector(H2oSelector()), "top must select single positions .* h2o"),
        (
            lambda: H2oSelector().index(0, torch.zeros(3, 1, 8), SOFTMAX),
            "H2oSelector: queries must be given, got None",
        ),
        (
            lambda: InfinigenSelector(9).index(
                0, torch.zeros(3, 1, 8), SOFTMAX, Queries(torch.zeros(0, 1, 1, 8), torch.zeros(0))
            ),
            "InfinigenSelector: channels must be in 1..8, got 9",
        ),
    ],
)
def test_rejects_a_broken_rule(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
