import pytest
import torch

from cases import LAYOUTS, make_caches, random_planes
from closeness import assert_equal
from hata import hamming_score, reference, score_select, select_topk

SEQ_LENS = [153, 1, 0, 5, 64]


def select(planes, caches, top_k, weight_sum, *, op=score_select, **options):
    return op(planes, *caches.codes, weight_sum=weight_sum, top_k=top_k, **options)


def assert_selects(planes, caches, top_k, weight_sum, **budget) -> None:
    budget |= {"return_cut": True}
    actual = select(planes, caches, top_k, weight_sum, **budget)
    expected = select(planes, caches, top_k, weight_sum, op=reference.score_select, **budget)
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e)


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64, None])
def test_matches_the_reference(device, algorithm, page_size, layout, key_norms):
    shape = {"page_size": page_size, "layout": layout, "key_norms": key_norms}
    caches = make_caches(SEQ_LENS, device=device, **shape)
    planes = random_planes(5, 4, 2, 15, 64, device=device)
    assert_selects(planes, caches, 20, 15, num_sink=2, num_recent=3)


@pytest.mark.parametrize("weight_sum", [1, 3, 4, 5, 7, 8, 12, 15, 16, 20, 255])
@pytest.mark.parametrize("key_norms", [False, True])
def test_any_weight_sum(device, algorithm, weight_sum, key_norms):
    caches = make_caches([137], device=device, key_norms=key_norms)
    planes = random_planes(1, 2, 2, weight_sum, 64, device=device)
    assert_selects(planes, caches, 24, weight_sum)


@pytest.mark.parametrize("num_bits", range(32, 257, 32))
@pytest.mark.parametrize("q_len", [2, 3])
@pytest.mark.parametrize("key_norms", [False, True])
def test_any_number_of_bits(device, algorithm, num_bits, q_len, key_norms):
    caches = make_caches([129, 40], device=device, num_bits=num_bits, key_norms=key_norms)
    planes = random_planes(2, q_len, 2, 15, num_bits, device=device)
    assert_selects(planes, caches, 24, 15, num_recent=4)


@pytest.mark.parametrize("q_len", range(1, 9))
@pytest.mark.parametrize("top_k", [1, 6, 60, 200])
def test_any_budget_and_query_tokens(device, algorithm, q_len, top_k):
    caches = make_caches([60, 7, 3, 0], device=device)
    planes = random_planes(4, q_len, 2, 7, 64, device=device)
    assert_selects(planes, caches, top_k, 7)
    assert_selects(planes, caches, top_k, 7, num_recent=1)


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("seq_len", [1023, 4096, 33_001])
def test_equals_score_then_select_on_long_sequences(device, algorithm, seq_len, key_norms):
    caches = make_caches([seq_len, seq_len // 2], device=device, key_norms=key_norms)
    planes = random_planes(2, 2, 2, 15, 64, device=device)
    scores = hamming_score(planes, *caches.codes, weight_sum=15, max_seq_len=caches.capacity)
    for top_k in (64, 1000):
        budget = {"num_sink": 4, "num_recent": 16, "return_cut": True}
        expected = select_topk(scores, caches.cache_seqlens, top_k=top_k, **budget)
        actual = select(planes, caches, top_k, 15, **budget)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)


@pytest.mark.parametrize("key_norms", [False, True])
def test_all_scores_equal(device, algorithm, key_norms):
    caches = make_caches([2000], device=device, key_norms=key_norms)
    caches.code_cache.fill_(0x5A5A5A5A)
    if key_norms:
        caches.norm_cache.fill_(2)
    planes = random_planes(1, 1, 2, 15, 64, device=device)
    indices, num_selected = select(planes, caches, 300, 15, num_sink=3)
    expected = torch.tensor([0, 1, 2, *range(1703, 2000)], dtype=torch.int32, device=device)
    assert_equal(indices, expected.expand(1, 1, 2, -1))
    assert (num_selected == 300).all()


@pytest.mark.parametrize("top_k", [50, 600, 1100, 1350, 1600, 1900])
def test_norms_of_any_value(device, algorithm, top_k):
    """Scores may be infinite, NaN (below everything), or zeros of either sign, and tie."""
    caches = make_caches([2000], device=device, key_norms=True)
    special = [torch.nan, torch.inf, 0.0, 1.0, 2.0, 65504.0, 2**-24, 3 * 2**-15]
    norms = torch.tensor(special, dtype=torch.float16)
    drawn = torch.randint(len(special), caches.norm_cache.shape)
    caches.norm_cache.copy_(norms[drawn])
    caches.code_cache[::2] = caches.code_cache[:1, :, :1]  # every other page holds one code
    planes = random_planes(1, 2, 2, 15, 64, device=device)
    assert_selects(planes, caches, top_k, 15, num_sink=2, num_recent=3)


def best_at(positions, seq_len, q_len, device):
    """Planes, the same for each token, and one sequence whose best keys are at ``positions``."""
    caches = make_caches([seq_len], device=device, num_kv_heads=1, page_size=None)
    planes = random_planes(1, 1, 1, 15, 64, device=device).expand(-1, q_len, -1, -1, -1)
    planes = planes.contiguous()
    page = caches.block_table[0, 0]
    caches.code_cache[page, 0, positions] = planes[0, 0, 0, 3]  # of the plane that weighs most
    return planes, caches


@pytest.mark.parametrize("q_len", [1, 4])
def test_keys_that_bunch(device, algorithm, q_len):
    """The best keys lie in a few runs: a sample of a slice says little of how many it holds."""
    seq_len, run = 200_000, 64
    starts = torch.randperm(seq_len // run)[:40] * run
    best = (starts[:, None] + torch.arange(run)).flatten().to(device)
    planes, caches = best_at(best, seq_len, q_len, device)
    for top_k in (len(best) - 50, len(best) + 50, 2 * len(best)):
        assert_selects(planes, caches, top_k, 15)


@pytest.mark.parametrize("q_len", [1, 4])
def test_best_keys_where_a_sample_looks(device, algorithm, q_len):
    """A sample of the first slice holds its beginning, and expects as many everywhere."""
    planes, caches = best_at(torch.arange(256, device=device), 200_000, q_len, device)
    assert_selects(planes, caches, 500, 15)


@pytest.mark.parametrize("key_norms", [False, True])
def test_does_not_depend_on_batch_paging_or_launch(device, algorithm, key_norms):
    """One sequence alone and contiguous, and at every place of paged batches of others."""
    caches = make_caches([700] * 9, device=device, page_size=16, key_norms=key_norms)
    planes = random_planes(9, 2, 2, 15, 64, device=device)
    for _ in range(3):
        many = select(planes, caches, 64, 15, num_recent=8)
        for b in (0, 4, 8):
            pages = caches.block_table[b].long()
            codes = caches.code_cache[pages].transpose(0, 1).flatten(1, 2).unsqueeze(0)
            norms = None
            if key_norms:
                norms = caches.norm_cache[pages].transpose(0, 1).flatten(1, 2).unsqueeze(0)
            alone = score_select(
                planes[b : b + 1],
                codes,
                norms,
                torch.zeros(1, 1, dtype=torch.int32, device=device),
                caches.cache_seqlens[b : b + 1],
                weight_sum=15,
                top_k=64,
                num_recent=8,
            )
            for a, e in zip(alone, many, strict=True):
                assert_equal(a, e[b : b + 1])


def test_accepts_an_empty_batch(device, algorithm):
    caches = make_caches([20], device=device)
    planes = random_planes(0, 1, 2, 7, 64, device=device)
    tensors = (caches.code_cache, None, caches.block_table[:0], caches.cache_seqlens[:0])
    indices, _ = score_select(planes, *tensors, weight_sum=7, top_k=4)
    assert indices.shape == (0, 1, 2, 4)


def test_batch_past_65535(device, algorithm):
    caches = make_caches([30], device=device, num_kv_heads=1, page_size=None)
    planes = random_planes(7, 1, 1, 15, 64, device=device)

    def run(batch: int) -> torch.Tensor:
        return score_select(
            planes.repeat(batch // 7, 1, 1, 1, 1),
            caches.code_cache,
            None,
            caches.block_table.repeat(batch, 1),
            caches.cache_seqlens.repeat(batch),
            weight_sum=15,
            top_k=6,
        )[0]

    assert_equal(run(70_000), run(7).repeat(10_000, 1, 1, 1))


@pytest.mark.parametrize("key_norms", [False, True])
def test_opcheck(device, key_norms):
    caches = make_caches([20, 7], device=device, page_size=32, key_norms=key_norms)
    planes = random_planes(2, 3, 2, 7, 64, device=device)
    args = (planes, *caches.codes, 7, 8, 1, 1)
    for return_cut in (False, True):
        kwargs = {"return_cut": return_cut}
        torch.library.opcheck(torch.ops.hata.score_select.default, args, kwargs)
