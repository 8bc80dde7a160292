import pytest
import torch

from cases import INT32_MAX, LAYOUTS, make_caches, random_indices, random_vectors, strided
from closeness import assert_equal, assert_no_worse_than_pytorch, plain_gather_attention
from hata import gather_attention, reference

SEQ_LENS = [153, 1, 0, 5, 64]


def assert_attends(q, caches, indices, attended, **settings) -> None:
    """FlashAttention's rule for out and for lse."""
    truth = reference.gather_attention(q.double(), *caches.double().kv, indices, **settings)
    plain = plain_gather_attention(q, *caches.kv, indices, **settings)
    for actual, plain_one, exact in zip(attended, plain, truth, strict=True):
        assert_no_worse_than_pytorch(actual, plain_one, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64, None])
def test_matches_the_reference(device, dtype, page_size, layout):
    shape = {"page_size": page_size, "layout": layout}
    caches = make_caches(SEQ_LENS, device=device, dtype=dtype, **shape)
    q = random_vectors(5, 2, 6, 64, dtype=dtype, device=device)
    indices = random_indices(SEQ_LENS, 2, 2, 37, device=device)
    out, lse = gather_attention(q, *caches.kv, indices)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_attends(q, caches, indices, (out, lse))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("group", [1, 4])
def test_any_head_dim(device, dtype, head_dim, group):
    caches = make_caches([90, 33], device=device, dtype=dtype, head_dim=head_dim)
    q = random_vectors(2, 1, 2 * group, head_dim, dtype=dtype, device=device)
    indices = random_indices([90, 33], 1, 2, 50, device=device)
    assert_attends(q, caches, indices, gather_attention(q, *caches.kv, indices))


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 12, 16, 17, 20, 33])
def test_any_group_size(device, group):
    caches = make_caches([70], device=device, dtype=torch.bfloat16)
    q = random_vectors(1, 2, 2 * group, 64, dtype=torch.bfloat16, device=device)
    indices = random_indices([70], 2, 2, 40, device=device)
    assert_attends(q, caches, indices, gather_attention(q, *caches.kv, indices))


@pytest.mark.parametrize("q_len", range(1, 9))
@pytest.mark.parametrize("top_k", [1, 15, 16, 17, 100])
def test_any_budget_and_query_tokens(device, q_len, top_k):
    seq_lens = [90, 5, 0]
    caches = make_caches(seq_lens, device=device)
    q = random_vectors(3, q_len, 6, 64, dtype=torch.float16, device=device)
    indices = random_indices(seq_lens, q_len, 2, top_k, device=device)
    assert_attends(q, caches, indices, gather_attention(q, *caches.kv, indices))


@pytest.mark.parametrize(("batch", "top_k"), [(1, 2048), (2, 1000), (3, 129), (40, 129)])
def test_large_budgets_are_split_and_combined(device, dtype, batch, top_k):
    seq_lens = [2500] * batch
    caches = make_caches(seq_lens, device=device, dtype=dtype, num_kv_heads=1, page_size=64)
    q = random_vectors(batch, 1, 3, 64, dtype=dtype, device=device)
    indices = random_indices(seq_lens, 1, 1, top_k, device=device)
    assert_attends(q, caches, indices, gather_attention(q, *caches.kv, indices))


def test_splits_that_are_empty(device, dtype):
    """Only the last few of 1000 indices name a row."""
    caches = make_caches([300], device=device, dtype=dtype, num_kv_heads=1)
    q = random_vectors(1, 1, 4, 64, dtype=dtype, device=device)
    indices = torch.full((1, 1, 1, 1000), -1, dtype=torch.int32, device=device)
    indices[..., -5:] = torch.tensor([7, 3, 299, 0, 150], dtype=torch.int32, device=device)
    assert_attends(q, caches, indices, gather_attention(q, *caches.kv, indices))


def test_dense_attention_where_everything_is_selected(device, dtype):
    """Against torch's own attention over the whole sequence, with the same rule."""
    seq_len, group = 120, 4
    caches = make_caches([seq_len, seq_len], device=device, dtype=dtype, page_size=None)
    q = random_vectors(2, 3, 2 * group, 64, dtype=dtype, device=device)
    indices = torch.arange(seq_len, dtype=torch.int32, device=device).expand(2, 3, 2, -1)
    out, _ = gather_attention(q, *caches.kv, indices.contiguous())
    pages = caches.block_table[:, 0].long()

    def dense(dtype_: torch.dtype) -> torch.Tensor:
        k, v = (
            cache[pages, :seq_len].transpose(1, 2).repeat_interleave(group, 1).to(dtype_)
            for cache in (caches.k_cache, caches.v_cache)
        )
        causal = torch.ones(3, seq_len, dtype=torch.bool, device=device).tril(seq_len - 3)
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2).to(dtype_), k, v, attn_mask=causal
        ).transpose(1, 2)

    assert_no_worse_than_pytorch(out, dense(dtype), dense(torch.float64))


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_softmax_scale(device, scale):
    caches = make_caches([90], device=device)
    q = random_vectors(1, 1, 6, 64, dtype=torch.float16, device=device)
    indices = random_indices([90], 1, 2, 50, device=device)
    attended = gather_attention(q, *caches.kv, indices, softmax_scale=scale)
    assert_attends(q, caches, indices, attended, softmax_scale=scale)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(device, dtype, softcap):
    """Logits of up to 60: both where tanh is nearly straight and where it is flat."""
    caches = make_caches([90], device=device, dtype=dtype)
    q = random_vectors(1, 2, 6, 64, dtype=dtype, device=device) * 15
    indices = random_indices([90], 2, 2, 50, device=device)
    attended = gather_attention(q, *caches.kv, indices, softcap=softcap)
    assert_attends(q, caches, indices, attended, softcap=softcap)


def test_nothing_selected(device, dtype):
    caches = make_caches([90, 0], device=device, dtype=dtype)
    q = random_vectors(2, 2, 6, 64, dtype=dtype, device=device)
    indices = torch.full((2, 2, 2, 200), -1, dtype=torch.int32, device=device)
    out, lse = gather_attention(q, *caches.kv, indices)
    assert_equal(out, torch.zeros_like(q))
    assert_equal(lse, torch.full((2, 2, 6), -torch.inf, device=device))


def test_indices_out_of_range_are_skipped(device, dtype):
    """Negative, past what the token sees, past the cache: neither read nor counted."""
    caches = make_caches([53, 16], device=device, dtype=dtype)
    q = random_vectors(2, 2, 6, 64, dtype=dtype, device=device)
    indices = random_indices([53, 16], 2, 2, 40, device=device)
    dirty = torch.cat([indices, indices], -1)
    far = [-2, -(2**31), INT32_MAX, 53, 54, 60, 64, caches.capacity, 10**6]
    dirty[..., 1::2] = torch.tensor(far * 5, dtype=torch.int32, device=device)[:40]
    dirty[..., ::2] = indices
    assert_attends(q, caches, dirty, gather_attention(q, *caches.kv, dirty))


def test_a_padding_token_sees_nothing(device):
    caches = make_caches([2], device=device)
    q = random_vectors(1, 4, 6, 64, dtype=torch.float16, device=device)
    indices = torch.zeros(1, 4, 2, 3, dtype=torch.int32, device=device)
    indices[..., 1:] = -1
    out, lse = gather_attention(q, *caches.kv, indices)
    assert (out[:, :2] == 0).all()
    assert (lse[:, :2] == -torch.inf).all()
    assert lse[:, 2:].isfinite().all()


def test_nan_in_a_selected_row_shows_and_elsewhere_does_not(device, dtype):
    caches = make_caches([40], device=device, dtype=dtype, page_size=None)
    page = int(caches.block_table[0, 0])
    caches.v_cache[page, 11, 0, 5] = torch.nan
    caches.k_cache[page, 12] = torch.nan
    q = random_vectors(1, 1, 4, 64, dtype=dtype, device=device)
    indices = torch.arange(12, dtype=torch.int32, device=device).expand(1, 1, 2, -1).contiguous()
    out, lse = gather_attention(q, *caches.kv, indices)
    expected = torch.zeros(1, 1, 4, 64, dtype=torch.bool, device=device)
    expected[:, :, :2, 5] = True
    assert_equal(out.isnan(), expected)
    assert lse.isfinite().all()


def test_large_logits_do_not_overflow(device, dtype):
    caches = make_caches([40], device=device, dtype=dtype)
    q = random_vectors(1, 1, 4, 64, dtype=dtype, device=device) * 100
    indices = random_indices([40], 1, 2, 40, device=device)
    assert_attends(q, caches, indices, gather_attention(q, *caches.kv, indices))


def test_does_not_depend_on_paging_or_launch(device, dtype):
    """A contiguous copy of a paged sequence gives the same bits, in every run."""
    caches = make_caches([150, 97], device=device, dtype=dtype, page_size=16, layout="hnd")
    q = strided(random_vectors(2, 2, 6, 64, dtype=dtype, device=device))
    indices = random_indices([150, 97], 2, 2, 64, device=device)
    out, lse = gather_attention(q, *caches.kv, indices)
    pages = caches.block_table.clamp(0, len(caches.k_cache) - 1).long()
    k, v = (cache[pages].flatten(1, 2) for cache in (caches.k_cache, caches.v_cache))
    table = torch.arange(2, dtype=torch.int32, device=device)[:, None]
    for _ in range(3):
        again = gather_attention(q.contiguous(), k, v, table, caches.cache_seqlens, indices)
        assert_equal(again[0], out)
        assert_equal(again[1], lse)


def test_batch_past_65535(device):
    caches = make_caches([30], device=device, num_kv_heads=1, page_size=None)
    q = random_vectors(7, 1, 1, 64, dtype=torch.float16, device=device)
    indices = random_indices([30], 1, 1, 6, device=device)

    def run(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        table, seqlens = caches.block_table.repeat(batch, 1), caches.cache_seqlens.repeat(batch)
        rows = indices.repeat(batch, 1, 1, 1)
        many = q.repeat(batch // 7, 1, 1, 1)
        return gather_attention(many, caches.k_cache, caches.v_cache, table, seqlens, rows)

    few, many = run(7), run(70_000)
    assert_equal(many[0], few[0].repeat(10_000, 1, 1, 1))
    assert_equal(many[1], few[1].repeat(10_000, 1, 1))


@pytest.mark.parametrize("shape", [(0, 1, 4, 64), (1, 0, 4, 64)])
def test_accepts_no_queries(device, shape):
    caches = make_caches([20], device=device)
    q = random_vectors(*shape, dtype=torch.float16, device=device)
    indices = torch.zeros(*shape[:2], 2, 4, dtype=torch.int32, device=device)
    tensors = (caches.block_table[: shape[0]], caches.cache_seqlens[: shape[0]])
    out, lse = gather_attention(q, caches.k_cache, caches.v_cache, *tensors, indices)
    assert out.shape == shape
    assert lse.shape == shape[:3]


def test_opcheck(device):
    caches = make_caches([20, 7], device=device, page_size=32)
    q = random_vectors(2, 3, 6, 64, dtype=torch.float16, device=device)
    args = (q, *caches.kv, random_indices([20, 7], 3, 2, 8, device=device), 0.125)
    torch.library.opcheck(torch.ops.hata.gather_attention.default, args)
