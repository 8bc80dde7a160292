"""What `hata recall` compares: scores of every selector, and the order they are selected in."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from closeness import assert_equal
from hata import HashWeights, hash_encode, reference
from hata.ops import encode_query, plane_weight_sum
from hata.selectors import (
    ExactSelector,
    H2oSelector,
    HataSelector,
    InfinigenSelector,
    LokiSelector,
    MagicpigSelector,
    QuestSelector,
    RabitqSelector,
    Selector,
    SnapkvSelector,
    Softmax,
    SparqSelector,
    StreamingSelector,
    VattentionSelector,
    key_components,
    rank,
)

NUM_QUERIES, NUM_KV_HEADS, GROUP, HEAD_DIM, SEQ_LEN = 5, 2, 3, 64, 150
SOFTMAX = Softmax(0.2)


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and ascending positions."""
    q = torch.randn(NUM_QUERIES, NUM_KV_HEADS, GROUP, HEAD_DIM)
    k = torch.randn(SEQ_LEN, NUM_KV_HEADS, HEAD_DIM)
    positions = torch.tensor([0, 20, 77, 148, 149])
    return q.to(device), k.to(device), positions.to(device)


def dense_shares(q: Tensor, k: Tensor, positions: Tensor, softmax: Softmax = SOFTMAX) -> Tensor:
    """``[num_queries, num_kv_heads, group, seq_len]``, float64, head by head."""
    shares = torch.zeros(NUM_QUERIES, NUM_KV_HEADS, GROUP, SEQ_LEN, dtype=torch.float64)
    for i, last in enumerate(positions.tolist()):
        for h in range(NUM_KV_HEADS):
            for g in range(GROUP):
                logits = k[: last + 1, h].double().cpu() @ q[i, h, g].double().cpu() * softmax.scale
                if softmax.softcap is not None:
                    logits = softmax.softcap * torch.tanh(logits / softmax.softcap)
                if softmax.sink_logits is not None:
                    logits = torch.cat([logits, softmax.sink_logits[h, g, None].double().cpu()])
                shares[i, h, g, : last + 1] = logits.softmax(0)[: last + 1]
    return shares


def assert_scores(
    selector: Selector, expected: Tensor, args: tuple[Tensor, ...], softmax: Softmax = SOFTMAX
) -> None:
    q, k, positions = args
    scores = selector.index(1, k, softmax)(q, positions)
    assert scores.dtype == torch.float32
    # float32 softmax of at most 150 terms against float64
    torch.testing.assert_close(scores.double().cpu(), expected, rtol=1e-4, atol=1e-7)


def test_exact_is_the_mean_of_the_groups_attention(device: str) -> None:
    args = inputs(device)
    assert_scores(ExactSelector(), dense_shares(*args).mean(2), args)


def test_a_softcap_and_sinks_change_the_mean_of_the_groups_attention(device: str) -> None:
    args = inputs(device)
    softmax = Softmax(0.2, 1.5, 3 * torch.randn(NUM_KV_HEADS, GROUP, device=device))
    expected = dense_shares(*args, softmax).mean(2)
    assert_scores(ExactSelector(), expected, args, softmax)
    assert (expected - dense_shares(*args).mean(2)).abs().max() > 1e-3


def test_exact_logits_are_the_sum_of_the_groups(device: str) -> None:
    q, k, positions = inputs(device)
    scores = ExactSelector(sum_logits=True).index(0, k, SOFTMAX)(q, positions)
    expected = torch.einsum("qhgd,shd->qhs", q.double(), k.double())
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("query_bits", [1, 2, 4])
@pytest.mark.parametrize("num_bits", [32, 96])
def test_hata_selects_what_decoding_selects(
    device: str, num_bits: int, query_bits: int, key_norms: bool, tied: bool
) -> None:
    """The same scores as `hata.reference.hamming_score`, and so the same selection."""
    q, k, positions = inputs(device)
    q, k = q.half().float(), k.half()  # a 16-bit cache
    keys, queries = torch.randn(2, 2, NUM_KV_HEADS, HEAD_DIM, num_bits).unbind()
    weights = HashWeights(keys, None if tied else queries, query_bits, key_norms)
    scores = HataSelector(weights).index(1, k, SOFTMAX)(q, positions)

    key_weights, query_weights = weights.layer(1, k.dtype, k.device)
    codes, norms = hash_encode(k[None], key_weights, key_norms=True)
    for i, last in enumerate(positions.tolist()):
        heads = q[i].flatten(0, 1)[None, None].half()
        cache_seqlens = torch.tensor([last + 1], dtype=torch.int32, device=device)
        expected = reference.hamming_score(
            encode_query(heads, query_weights, query_bits=query_bits),
            codes,
            norms if key_norms else None,
            torch.zeros(1, 1, dtype=torch.int32, device=device),
            cache_seqlens,
            weight_sum=plane_weight_sum(query_bits, GROUP),
            max_seq_len=SEQ_LEN,
        )
        assert_equal(scores[i, :, : last + 1], expected[0, 0, :, : last + 1].float())
        indices, num_selected = reference.select_topk(
            expected, cache_seqlens, top_k=24, num_sink=2, num_recent=3
        )
        order = rank(scores[i : i + 1], positions[i : i + 1], 24, num_sink=2, num_recent=3)
        for h in range(NUM_KV_HEADS):
            chosen = order[0, h][order[0, h] >= 0].sort().values
            assert_equal(chosen.int(), indices[0, 0, h, : num_selected[0, 0, h]])


def test_hata_of_a_recipe() -> None:
    weights = HashWeights.random(num_layers=1, num_kv_heads=1, head_dim=8, num_bits=64)
    assert (
        HataSelector(replace(weights, query_bits=1, key_norms=True)).variant
        == "random, 64 bits, query 1, norms"
    )
    named = HashWeights(weights.key_weights, metadata={"recipe": "ours"})
    assert HataSelector(named).settings["recipe"] == "ours"


def test_loki_with_all_channels_is_exact(device: str) -> None:
    args = inputs(device)
    components = key_components([torch.randn(500, NUM_KV_HEADS, HEAD_DIM)] * 2, args[1].device)
    selector = LokiSelector(HEAD_DIM, components)
    assert_scores(selector, dense_shares(*args).mean(2), args)


def test_the_components_are_those_of_the_largest_variance(device: str) -> None:
    basis = torch.linalg.qr(torch.randn(NUM_KV_HEADS, 16, 16)).Q
    spread = torch.linspace(4.0, 0.5, 16)
    keys = torch.randn(20000, NUM_KV_HEADS, 16) * spread
    layer = torch.einsum("nhd,hed->nhe", keys, basis) + 3.0  # a mean that is no component
    found = key_components([layer], torch.device(device))[0]
    # Neighbouring variances differ by a tenth, of 20000 samples: the directions nearly coincide.
    overlap = (found.mT @ basis).abs().diagonal(dim1=-2, dim2=-1)
    assert (overlap > 0.98).all()


def test_loki_reads_the_first_channels_alone(device: str) -> None:
    q, k, positions = inputs(device)
    components = torch.eye(HEAD_DIM).expand(2, NUM_KV_HEADS, -1, -1)
    scores = LokiSelector(5, components).index(1, k, SOFTMAX)(q, positions)
    first = ExactSelector().index(1, k[..., :5], SOFTMAX)(q[..., :5], positions)
    torch.testing.assert_close(scores, first)


def test_quest_bounds_the_logits_of_a_page(device: str) -> None:
    q, k, positions = inputs(device)
    scores = QuestSelector(16).index(0, k, SOFTMAX)(q, positions)
    assert scores.shape == (NUM_QUERIES, NUM_KV_HEADS, 10)
    for page in range(10):
        keys = k[16 * page : 16 * page + 16]
        low, high = keys.amin(0)[:, None], keys.amax(0)[:, None]
        expected = torch.maximum(q * low, q * high).sum((2, 3))
        torch.testing.assert_close(scores[..., page], expected, rtol=1e-5, atol=1e-3)
        logits = torch.einsum("qhgd,shd->qhgs", q, keys)
        assert (scores[..., page] >= logits.amax(-1).sum(2) - 1e-3).all()


def test_sparq_reads_the_largest_channels(device: str) -> None:
    q, k, positions = inputs(device)
    expected = torch.zeros(NUM_QUERIES, NUM_KV_HEADS, SEQ_LEN, dtype=torch.float64)
    for i, last in enumerate(positions.tolist()):
        for h in range(NUM_KV_HEADS):
            chosen = q[i, h].abs().sum(0).topk(7).indices
            for g in range(GROUP):
                query = q[i, h, g].double()
                share = query[chosen].abs().sum() / query.abs().sum()
                logits = (
                    k[: last + 1, h, chosen].double() @ query[chosen] * SOFTMAX.scale / share.sqrt()
                )
                expected[i, h, : last + 1] += logits.softmax(0).cpu() / GROUP
    assert_scores(SparqSelector(7), expected, (q, k, positions))


def test_sparq_with_all_channels_is_exact(device: str) -> None:
    args = inputs(device)
    assert_scores(SparqSelector(HEAD_DIM), dense_shares(*args).mean(2), args)


def test_streaming_takes_sinks_and_the_most_recent(device: str) -> None:
    q, k, positions = inputs(device)
    scores = StreamingSelector().index(0, k, SOFTMAX)(q, positions)
    order = rank(scores, positions, 12, num_sink=4, num_recent=3)
    expected = [0, 1, 2, 3, *range(SEQ_LEN - 8, SEQ_LEN)]
    assert order[-1, 1].sort().values.tolist() == expected


def test_rabitq_is_exact_for_keys_that_are_corners(device: str) -> None:
    """Where rotated centred keys have channels of one size, signs and factor say all of them."""
    q, _, positions = inputs(device)
    corners = torch.where(torch.randn(SEQ_LEN // 2, NUM_KV_HEADS, HEAD_DIM) > 0, 1.0, -1.0)
    corners = torch.cat([corners, -corners]) * 0.3  # their mean is zero
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM, generator=generator)
    rotation = torch.linalg.qr(drawn).Q
    k = torch.einsum("she,hde->shd", corners, rotation).to(device)
    levels = torch.randint(-7, 8, q.shape).float()
    levels[..., 0] = 7.0  # the largest, so that rounding to 4 bits changes nothing
    q = torch.einsum("qhge,hde->qhgd", levels, rotation).to(device)
    args = (q, k, positions)
    expected = dense_shares(*args).mean(2)
    assert_scores(RabitqSelector(), expected, args)
    moved = (q, k + 2.5, positions)  # a mean key adds the same to all logits of a query
    assert_scores(RabitqSelector(), expected, moved)


def test_magicpig_counts_the_tables_with_a_collision(device: str) -> None:
    q, k, positions = inputs(device)
    scores = MagicpigSelector(num_tables=20, num_table_bits=3).index(0, k, SOFTMAX)(q, positions)
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(HEAD_DIM, 20, 3, generator=generator).to(device)
    keys = torch.einsum("shd,dlb->shlb", k - k.mean(0), tables) > 0
    queries = torch.einsum("qhgd,dlb->qhglb", q, tables) > 0
    for i, h in ((0, 0), (3, 1)):
        same = (queries[i, h][:, None] == keys[:, h][None]).all(-1)  # [group, seq_len, tables]
        assert_equal(scores[i, h], same.sum((0, 2)).float())


def test_bytes_of_a_token() -> None:
    weights = HashWeights.random(num_layers=1, num_kv_heads=1, head_dim=64, num_bits=64)
    components = torch.zeros(1, 1, 64, 64)
    found = {
        selector.name: selector.bytes_per_token(64)
        for selector in (
            ExactSelector(),
            HataSelector(weights),
            LokiSelector(16, components),
            QuestSelector(16),
            SparqSelector(8),
            StreamingSelector(),
            RabitqSelector(),
            MagicpigSelector(150, 10),
            SnapkvSelector(),
            H2oSelector(),
            InfinigenSelector(19),
            VattentionSelector(SparqSelector(4)),
        )
    }
    others = {"quest": 16, "sparq": 16, "streaming": 0, "rabitq": 10, "magicpig": 187.5}
    others |= {"snapkv": 0, "h2o": 0, "infinigen": 38, "vattention": 8}
    assert found == {"exact": 128, "hata": 8, "loki": 32, **others}
    assert HataSelector(replace(weights, key_norms=True)).bytes_per_token(64) == 10


@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize(("num_sink", "num_recent"), [(0, 0), (2, 5), (30, 40)])
@pytest.mark.parametrize("scores", ["random", "ties", "equal", "signs"])
def test_the_order_is_the_rule(
    device: str, scores: str, num_sink: int, num_recent: int, page_size: int
) -> None:
    num_pages = -(-SEQ_LEN // page_size)
    shape = (NUM_QUERIES, NUM_KV_HEADS, num_pages)
    drawn = {
        "random": torch.randn(shape),
        "ties": torch.randint(-3, 3, shape).float(),
        "equal": torch.zeros(shape),
        "signs": torch.randint(0, 2, shape).float() * -0.0 + torch.randint(-1, 2, shape) * 1e-30,
    }[scores]
    positions = torch.tensor([0, 20, 77, 148, 149])
    order = rank(
        drawn.to(device),
        positions.to(device),
        60,
        num_sink=num_sink,
        num_recent=num_recent,
        page_size=page_size,
    ).cpu()
    assert order.shape == (NUM_QUERIES, NUM_KV_HEADS, 60 // page_size * page_size)
    for i, last in enumerate(positions.tolist()):
        for h in range(NUM_KV_HEADS):
            pages = [p for p in range(num_pages) if p * page_size <= last]

            def key(page: int, i: int = i, h: int = h, last: int = last) -> tuple:
                inside = range(page * page_size, (page + 1) * page_size)
                always = any(t < num_sink or t > last - num_recent for t in inside)
                return (always, float(drawn[i, h, page]) + 0.0, page)

            pages.sort(key=key, reverse=True)
            wanted = [t for p in pages for t in range(p * page_size, (p + 1) * page_size)]
            wanted = [t if t <= last else -1 for t in wanted][: order.shape[-1]]
            wanted += [-1] * (order.shape[-1] - len(wanted))
            assert order[i, h].tolist() == wanted


def test_a_budget_past_the_sequence_orders_everything(device: str) -> None:
    scores, positions = torch.randn(1, 1, 9, device=device), torch.tensor([8], device=device)
    order = rank(scores, positions, 100, num_sink=1, num_recent=1)
    assert sorted(order.flatten().tolist()) == list(range(9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuestSelector(0), "QuestSelector: page_size must be at least 1, got 0"),
        (lambda: MagicpigSelector(0), "MagicpigSelector: num_tables must be at least 1, got 0"),
        (lambda: MagicpigSelector(1, 25), "num_table_bits must be in 1..24, got 25"),
        (lambda: SparqSelector(0), "SparqSelector: channels must be at least 1, got 0"),
        (lambda: LokiSelector(9, torch.zeros(1, 1, 8, 8)), "channels must be in 1..8, got 9"),
        (
            lambda: HataSelector(HashWeights(torch.zeros(2, 1, 8, 64), layer_bits=(32, 64))),
            "HataSelector: weights must have one num_bits for all layers",
        ),
        (
            lambda: SparqSelector(9).index(0, torch.zeros(3, 1, 8), SOFTMAX),
            "SparqSelector: channels must be in 1..8, got 9",
        ),
    ],
)
def test_rejects_a_broken_rule(make, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make()
