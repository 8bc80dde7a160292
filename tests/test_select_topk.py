import pytest
import torch

from cases import strided
from closeness import assert_equal
from hata import reference, select_topk

DTYPES = [torch.int32, torch.float16, torch.float32]
SEQ_LENS = [300, 53, 16, 1, 0, 2]


def random_scores(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Few different values, so that the cut falls on a tie; every row ends in garbage."""
    return torch.randint(-20, 21, shape).to(dtype).to(device)


def lengths(seq_lens: list[int], device: str) -> torch.Tensor:
    return torch.tensor(seq_lens, dtype=torch.int32, device=device)


def assert_selects(scores, cache_seqlens, top_k, num_sink=0, num_recent=0) -> None:
    budget = {"top_k": top_k, "num_sink": num_sink, "num_recent": num_recent, "return_cut": True}
    actual = select_topk(scores, cache_seqlens, **budget)
    expected = reference.select_topk(scores, cache_seqlens, **budget)
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e)


@pytest.mark.parametrize("dtype_", DTYPES, ids=str)
@pytest.mark.parametrize(("num_sink", "num_recent"), [(0, 0), (4, 0), (0, 8), (3, 5), (7, 9)])
@pytest.mark.parametrize("top_k", [16, 17, 64])
def test_matches_the_reference(device, top_k, num_sink, num_recent, dtype_):
    scores = random_scores(6, 3, 2, 310, dtype=dtype_, device=device)
    assert_selects(scores, lengths(SEQ_LENS, device), top_k, num_sink, num_recent)


@pytest.mark.parametrize("dtype_", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 300, 301, 1000])
def test_any_budget(device, top_k, dtype_):
    scores = random_scores(6, 1, 2, 310, dtype=dtype_, device=device)
    assert_selects(scores, lengths(SEQ_LENS, device), top_k)
    assert_selects(scores, lengths(SEQ_LENS, device), top_k, num_recent=1)


@pytest.mark.parametrize("q_len", range(1, 9))
def test_every_query_token_sees_its_own_positions(device, q_len):
    scores = random_scores(4, q_len, 2, 60, dtype=torch.int32, device=device)
    assert_selects(scores, lengths([60, 7, 3, 0], device), 6, 1, 2)


@pytest.mark.parametrize("dtype_", DTYPES, ids=str)
def test_distinct_scores_of_every_magnitude(device, dtype_):
    """Every bit of the score decides somewhere; several tiles of any kernel."""
    if dtype_ == torch.int32:
        scores = torch.randint(-(2**31), 2**31, (2, 1, 2, 5000), dtype=torch.int32)
    else:
        exponents = torch.linspace(-20, 14, 5000)[torch.randperm(5000)]
        scores = (torch.randn(2, 1, 2, 5000) * exponents.exp2()).to(dtype_)
    assert_selects(scores.to(device), lengths([5000, 4097], device), 700, 4, 16)


@pytest.mark.parametrize("dtype_", DTYPES, ids=str)
def test_equal_scores_go_to_the_most_recent(device, dtype_):
    scores = torch.full((1, 1, 1, 200), 3, dtype=dtype_, device=device)
    indices, num_selected = select_topk(scores, lengths([150], device), top_k=10, num_sink=2)
    assert indices.flatten().tolist() == [0, 1, *range(142, 150)]
    assert num_selected.item() == 10


def test_equal_scores_over_many_tiles(device):
    scores = torch.zeros(1, 1, 1, 9000, dtype=torch.int32, device=device)
    scores[..., ::7] = 5
    assert_selects(scores, lengths([9000], device), 1200, 4, 16)
    assert_selects(scores, lengths([8999], device), 2000, 4, 16)


@pytest.mark.parametrize("dtype_", DTYPES, ids=str)
def test_few_long_lists_of_unequal_length(device, dtype_):
    """On a GPU several blocks share each: cuts within ties, across blocks, and none at all."""
    cache_seqlens = lengths([50_000, 33, 40_961], device)
    few = random_scores(3, 2, 1, 50_000, dtype=dtype_, device=device)
    distinct = torch.randn(few.shape, device=device).mul(1e6).to(dtype_)
    late = torch.zeros_like(few)
    late[..., 40_000:40_100] = 1
    for scores in (few, distinct, late):
        assert_selects(scores, cache_seqlens, 700, 4, 16)
    assert_selects(few, cache_seqlens, 20, 4, 16)
    assert_selects(few, cache_seqlens, 45_000)


def test_a_share_grows_with_what_a_token_sees(device):
    scores = random_scores(6, 2, 1, 310, dtype=torch.int32, device=device)
    budget = {"top_k": 20, "num_sink": 1, "num_recent": 2, "top_k_share": 0.1, "min_top_k": 5}
    indices, num_selected = select_topk(
        scores, lengths([301, 101, 100, 51, 50, 3], device), **budget
    )
    assert indices.shape[-1] == 20
    assert num_selected[..., 0].tolist() == [[20, 20], [10, 11], [10, 10], [5, 6], [5, 5], [2, 3]]
    budget |= {"top_k_share": None, "min_top_k": None}
    alone = select_topk(scores[1:2, 1:], lengths([101], device), **{**budget, "top_k": 11})
    assert_equal(indices[1, 1, :, :11], alone[0][0, 0])


def test_sink_and_recent_count_inside_the_budget(device):
    scores = torch.arange(100, dtype=torch.int32, device=device).neg().view(1, 1, 1, 100)
    indices, _ = select_topk(scores, lengths([90], device), top_k=8, num_sink=2, num_recent=3)
    assert indices.flatten().tolist() == [0, 1, 2, 3, 4, 87, 88, 89]
    indices, _ = select_topk(scores, lengths([90], device), top_k=5, num_sink=2, num_recent=3)
    assert indices.flatten().tolist() == [0, 1, 87, 88, 89]


@pytest.mark.parametrize("dtype_", DTYPES, ids=str)
def test_says_how_a_selection_ended(device, dtype_):
    """The lowest score that was taken, and how many have it; nothing where no score counted."""
    row = [9, 9, 5, 3, 3, 3, 3, 1, 3, 9]  # a sink, eight that compete, and a recent one
    scores = torch.tensor(row, dtype=dtype_, device=device).expand(5, 1, 1, -1)
    kept = {"num_sink": 1, "num_recent": 1, "return_cut": True}
    lowest = -torch.inf if dtype_.is_floating_point else -(2**31)
    # Of 10, 10, 9, 4 and 0 visible positions.
    seqlens = lengths([10, 10, 9, 4, 0], device)
    for top_k, expected_scores, expected_ties in (
        (2, [lowest] * 5, [0] * 5),
        (4, [5, 5, 5, lowest, lowest], [1, 1, 1, 0, 0]),
        (5, [3, 3, 3, lowest, lowest], [5, 5, 4, 0, 0]),
        (9, [3, 3, lowest, lowest, lowest], [5, 5, 0, 0, 0]),
    ):
        *_, last_score, num_ties = select_topk(scores, seqlens, top_k=top_k, **kept)
        assert last_score.dtype == dtype_
        assert last_score.flatten().tolist() == expected_scores
        assert num_ties.flatten().tolist() == expected_ties


def test_sink_and_recent_that_overlap(device):
    scores = random_scores(1, 1, 1, 10, dtype=torch.int32, device=device)
    indices, num_selected = select_topk(
        scores, lengths([5], device), top_k=9, num_sink=4, num_recent=5
    )
    assert indices.flatten().tolist() == [0, 1, 2, 3, 4, -1, -1, -1, -1]
    assert num_selected.item() == 5


@pytest.mark.parametrize("dtype_", [torch.float16, torch.float32], ids=str)
def test_special_values(device, dtype_):
    """NaN below -infinity, -0 equal to +0, subnormals in order."""
    tiny = torch.finfo(dtype_).smallest_normal / 4
    special = [torch.nan, -torch.inf, torch.inf, 0.0, -0.0, tiny, -tiny, 1.0, -1.0, -torch.nan]
    values = torch.tensor(special).to(dtype_)
    scores = torch.stack([values[torch.randint(len(special), (60,))] for _ in range(40)])
    scores = scores.view(20, 1, 2, 60).to(device)
    for top_k in (5, 20, 45, 59):
        assert_selects(scores, lengths([60] * 20, device), top_k)


def test_does_not_depend_on_the_batch_or_the_launch(device):
    """The same row alone, at any place of any batch, in any query token and run."""
    row = random_scores(1, 1, 1, 3000, dtype=torch.int32, device=device)
    indices, num_selected = select_topk(row, lengths([2900], device), top_k=256, num_recent=16)
    for batch, heads in ((1, 1), (2, 3), (17, 8), (150, 2)):
        scores = row.expand(batch, 1, heads, -1)
        for _ in range(3):
            many, counts = select_topk(
                scores, lengths([2900] * batch, device), top_k=256, num_recent=16
            )
            assert_equal(many, indices.expand(batch, 1, heads, -1))
            assert_equal(counts, num_selected.expand(batch, 1, heads))


@pytest.mark.parametrize("dtype_", DTYPES, ids=str)
def test_reads_strided_scores(device, dtype_):
    scores = random_scores(6, 3, 2, 310, dtype=dtype_, device=device)
    wide = torch.zeros(6, 2, 5, 333, dtype=dtype_, device=device).transpose(1, 2)
    wide[:, 1:4, :, 9:319] = scores
    cache_seqlens = lengths(SEQ_LENS, device)
    expected = select_topk(scores, cache_seqlens, top_k=20, num_sink=2)
    sources = [wide[:, 1:4, :, 9:319]]
    if dtype_.is_floating_point:
        sources.append(strided(scores))
    for source in sources:
        for a, e in zip(
            select_topk(source, cache_seqlens, top_k=20, num_sink=2), expected, strict=True
        ):
            assert_equal(a, e)


@pytest.mark.parametrize("shape", [(0, 1, 2, 9), (2, 0, 2, 9), (2, 1, 2, 0)])
def test_accepts_no_scores(device, shape):
    scores = torch.zeros(shape, dtype=torch.int32, device=device)
    indices, num_selected = select_topk(scores, lengths([0] * shape[0], device), top_k=4)
    assert_equal(
        indices, torch.full((*shape[:3], min(4, shape[3])), -1, dtype=torch.int32, device=device)
    )
    assert_equal(num_selected, torch.zeros(shape[:3], dtype=torch.int32, device=device))


def test_batch_past_65535(device):
    scores = random_scores(7, 1, 1, 20, dtype=torch.int32, device=device)
    few, _ = select_topk(scores, lengths([20] * 7, device), top_k=5)
    many, counts = select_topk(
        scores.repeat(10_000, 1, 1, 1), lengths([20] * 70_000, device), top_k=5
    )
    assert_equal(many, few.repeat(10_000, 1, 1, 1))
    assert (counts == 5).all()


@pytest.mark.parametrize("dtype_", DTYPES, ids=str)
def test_opcheck(device, dtype_):
    scores = random_scores(2, 3, 2, 40, dtype=dtype_, device=device)
    args = (scores, lengths([40, 9], device), 8, 2, 2)
    for return_cut in (False, True):
        kwargs = {"return_cut": return_cut}
        torch.library.opcheck(torch.ops.hata.select_topk.default, args, kwargs)
