import pytest
import torch
from torch import Tensor

from cases import LAYOUTS, Caches, make_caches, poisoned, random_vectors, strided
from closeness import (
    assert_equal,
    assert_no_worse_than_pytorch,
    assert_within_rounding,
    plain_gather_attention,
)
from devices import gpu_only
from hata import dense_attention, gather_attention, merge_attention_states, reference

SEQ_LENS = [153, 1, 0, 5, 64]


def everything(q: Tensor, caches: Caches) -> Tensor:
    """Indices of all positions that there may be, for gather_attention."""
    longest = int(caches.cache_seqlens.max())
    shape = (*q.shape[:2], caches.k_cache.shape[2], max(longest, 1))
    positions = torch.arange(shape[-1], dtype=torch.int32, device=q.device)
    return positions.expand(shape).contiguous()


def assert_attends(q, caches, attended, **settings) -> None:
    """FlashAttention's rule for out and for lse."""
    truth = reference.dense_attention(q.double(), *caches.double().kv, **settings)
    plain = plain_gather_attention(q, *caches.kv, everything(q, caches), **settings)
    assert attended[0].dtype == q.dtype
    assert attended[1].dtype == torch.float32
    for actual, plain_one, exact in zip(attended, plain, truth, strict=True):
        assert_no_worse_than_pytorch(actual, plain_one, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64, None])
@pytest.mark.parametrize("q_len", [1, 3])
def test_matches_the_reference(device, dtype, q_len, page_size, layout):
    """Ragged: with q_len 3 some sequences are shorter than their new tokens."""
    shape = {"page_size": page_size, "layout": layout}
    caches = make_caches(SEQ_LENS, device=device, dtype=dtype, **shape)
    q = strided(random_vectors(5, q_len, 6, 64, dtype=dtype, device=device))
    out, lse = dense_attention(q, *caches.kv)
    assert_attends(q, caches, (out, lse))
    assert (out[2] == 0).all()
    assert (lse[2] == -torch.inf).all()


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (4, 1), (4, 4)])
def test_any_head_dim(device, dtype, head_dim, group, q_len):
    caches = make_caches([90, 33], device=device, dtype=dtype, head_dim=head_dim)
    q = random_vectors(2, q_len, 2 * group, head_dim, dtype=dtype, device=device)
    assert_attends(q, caches, dense_attention(q, *caches.kv))


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 12, 16, 17, 20, 33])
@pytest.mark.parametrize("q_len", [1, 2])
def test_any_group_size(device, group, q_len):
    caches = make_caches([70, 13], device=device, dtype=torch.bfloat16)
    q = random_vectors(2, q_len, 2 * group, 64, dtype=torch.bfloat16, device=device)
    assert_attends(q, caches, dense_attention(q, *caches.kv))


@pytest.mark.parametrize("q_len", [*range(1, 10), 40])
@pytest.mark.parametrize("group", [1, 3, 6])
def test_any_number_of_query_tokens(device, q_len, group):
    caches = make_caches([90, 5, 0], device=device)
    q = random_vectors(3, q_len, 2 * group, 64, dtype=torch.float16, device=device)
    assert_attends(q, caches, dense_attention(q, *caches.kv))


@pytest.mark.parametrize("seq_len", [15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_lengths_around_tiles_and_splits(device, dtype, seq_len):
    seq_lens = [seq_len, seq_len - 2]
    caches = make_caches(seq_lens, device=device, dtype=dtype)
    q = random_vectors(2, 2, 4, 64, dtype=dtype, device=device)
    assert_attends(q, caches, dense_attention(q, *caches.kv))


@pytest.mark.parametrize("batch", [1, 2, 3, 40])
@pytest.mark.parametrize("q_len", [1, 2])
def test_long_sequences_are_split_and_combined(device, dtype, batch, q_len):
    """In ragged batches the splits of a short sequence have nothing to do."""
    seq_lens = [2500 if b % 2 == 0 else 17 * b for b in range(batch)]
    caches = make_caches(seq_lens, device=device, dtype=dtype, num_kv_heads=1, page_size=64)
    q = random_vectors(batch, q_len, 3, 64, dtype=dtype, device=device)
    assert_attends(q, caches, dense_attention(q, *caches.kv))


def test_more_parts_than_a_warp_has_lanes(device, dtype):
    caches = make_caches([9000], device=device, dtype=dtype, num_kv_heads=1, page_size=64)
    q = random_vectors(1, 1, 4, 64, dtype=dtype, device=device)
    assert_attends(q, caches, dense_attention(q, *caches.kv))


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_softmax_scale(device, scale):
    caches = make_caches([90], device=device)
    q = random_vectors(1, 1, 6, 64, dtype=torch.float16, device=device)
    attended = dense_attention(q, *caches.kv, softmax_scale=scale)
    assert_attends(q, caches, attended, softmax_scale=scale)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize(("q_len", "group"), [(1, 1), (3, 4)])
def test_softcap(device, dtype, q_len, group, softcap):
    """Logits of up to 60: both where tanh is nearly straight and where it is flat."""
    caches = make_caches([90, 1500], device=device, dtype=dtype)
    q = random_vectors(2, q_len, 2 * group, 64, dtype=dtype, device=device) * 15
    attended = dense_attention(q, *caches.kv, softcap=softcap)
    assert_attends(q, caches, attended, softcap=softcap)


def test_large_logits_do_not_overflow(device, dtype):
    caches = make_caches([400], device=device, dtype=dtype)
    q = random_vectors(1, 2, 4, 64, dtype=dtype, device=device) * 100
    attended = dense_attention(q, *caches.kv)
    truth = reference.dense_attention(q.double(), *caches.double().kv)
    # Logits of hundreds have roundings in float32 that plain PyTorch may have the luck to avoid.
    assert_within_rounding(attended, truth, q, caches.k_cache, caches.v_cache, 400)


@pytest.mark.parametrize("min_sparse_len", [0, 1, 64, 65, 2**31 - 1])
def test_leaves_long_sequences_as_they_are(device, dtype, min_sparse_len):
    seq_lens = [*SEQ_LENS, 1500]
    caches = make_caches(seq_lens, device=device, dtype=dtype)
    q = random_vectors(6, 2, 6, 64, dtype=dtype, device=device)
    buffers = {
        "out": poisoned(*q.shape, dtype=dtype, device=device),
        "lse": poisoned(*q.shape[:3], dtype=torch.float32, device=device),
    }
    before = [t.clone() for t in buffers.values()]
    attended = dense_attention(q, *caches.kv, min_sparse_len=min_sparse_len, **buffers)
    assert [t.data_ptr() for t in attended] == [t.data_ptr() for t in buffers.values()]
    allocated = dense_attention(q, *caches.kv, min_sparse_len=min_sparse_len)
    whole = dense_attention(q, *caches.kv)
    expected = reference.dense_attention(q, *caches.kv, min_sparse_len=min_sparse_len)
    for b, seq_len in enumerate(seq_lens):
        for actual, fresh, all_of_them, empty, old in zip(
            attended, allocated, whole, expected, before, strict=True
        ):
            left = seq_len >= min_sparse_len
            assert_equal(actual[b], old[b] if left else all_of_them[b])
            assert_equal(fresh[b], empty[b] if left else all_of_them[b])


def test_equals_gather_attention_over_everything(device, dtype):
    caches = make_caches([300, 41], device=device, dtype=dtype)
    q = random_vectors(2, 3, 8, 64, dtype=dtype, device=device)
    listed = gather_attention(q, *caches.kv, everything(q, caches))
    rounding = 4 * torch.finfo(dtype).eps
    for actual, expected in zip(dense_attention(q, *caches.kv), listed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)


def test_a_sink_logit_is_a_state_without_a_value(device, dtype):
    """One more logit for each head, as in gpt-oss: merged with the result, not an argument."""
    caches = make_caches([60], device=device, dtype=dtype, page_size=64)
    q = random_vectors(1, 1, 6, 64, dtype=dtype, device=device)
    sinks = torch.randn(6).to(device)
    out, lse = dense_attention(q, *caches.kv)
    state = torch.zeros_like(out), sinks.expand(lse.shape).contiguous()
    merged, merged_lse = merge_attention_states(out, lse, *state)
    k, v = (
        t[int(caches.block_table[0, 0]), :60].double().repeat_interleave(3, 1)
        for t in (caches.k_cache, caches.v_cache)
    )
    logits = torch.einsum("hd,thd->ht", q[0, 0].double(), k) / 8
    logits = torch.cat([logits, sinks.double()[:, None]], -1)
    expected = torch.einsum("ht,thd->hd", logits.softmax(-1)[:, :-1], v)
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(merged[0, 0].double(), expected, rtol=rounding, atol=rounding)
    expected_lse = logits.logsumexp(-1)
    torch.testing.assert_close(merged_lse[0, 0].double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_does_not_depend_on_paging_capacity_or_launch(device, dtype):
    """A contiguous copy of a paged sequence, with room for more, gives the same bits."""
    caches = make_caches([1500, 97], device=device, dtype=dtype, page_size=16, layout="hnd")
    q = random_vectors(2, 2, 6, 64, dtype=dtype, device=device)
    out, lse = dense_attention(q, *caches.kv)
    pages = caches.block_table.clamp(0, len(caches.k_cache) - 1).long()
    k, v = (cache[pages].flatten(1, 2) for cache in (caches.k_cache, caches.v_cache))
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 4000)) for t in (k, v))
    table = torch.arange(2, dtype=torch.int32, device=device)[:, None]
    for _ in range(3):
        again = dense_attention(q, k, v, table, caches.cache_seqlens)
        assert_equal(again[0], out)
        assert_equal(again[1], lse)


def test_batch_past_65535(device):
    caches = make_caches([30], device=device, num_kv_heads=1, page_size=None)
    q = random_vectors(7, 1, 1, 64, dtype=torch.float16, device=device)

    def run(batch: int) -> tuple[Tensor, Tensor]:
        table, seqlens = caches.block_table.repeat(batch, 1), caches.cache_seqlens.repeat(batch)
        many = q.repeat(batch // 7, 1, 1, 1)
        return dense_attention(many, caches.k_cache, caches.v_cache, table, seqlens)

    few, many = run(7), run(70_000)
    assert_equal(many[0], few[0].repeat(10_000, 1, 1, 1))
    assert_equal(many[1], few[1].repeat(10_000, 1, 1))


@pytest.mark.parametrize("shape", [(0, 1, 4, 64), (1, 0, 4, 64)])
def test_accepts_no_queries(device, shape):
    caches = make_caches([20], device=device)
    q = random_vectors(*shape, dtype=torch.float16, device=device)
    tensors = (caches.block_table[: shape[0]], caches.cache_seqlens[: shape[0]])
    out, lse = dense_attention(q, caches.k_cache, caches.v_cache, *tensors)
    assert out.shape == shape
    assert lse.shape == shape[:3]


def test_opcheck(device):
    caches = make_caches([20, 7], device=device, page_size=32)
    q = random_vectors(2, 3, 6, 64, dtype=torch.float16, device=device)
    out, lse = torch.zeros_like(q), torch.zeros(2, 3, 6, device=device)
    args = (q, *caches.kv, 0.125, 50.0, 8)
    op = torch.ops.hata.dense_attention.default
    torch.library.opcheck(op, args, {"out": out, "lse": lse})


@gpu_only
@pytest.mark.parametrize("captured", [[1, 2, 3], [9000] * 3])
@pytest.mark.parametrize("q_len", [1, 4])
def test_a_graph_replays_with_other_lengths_and_pages(q_len, captured):
    caches = make_caches([9024] * 3, device="cuda", page_size=64)
    q = random_vectors(3, q_len, 8, 64, dtype=torch.float16, device="cuda")
    caches.cache_seqlens.copy_(torch.tensor(captured))
    buffers = {"out": torch.empty_like(q), "lse": torch.empty(3, q_len, 8, device="cuda")}

    def step() -> None:
        dense_attention(q, *caches.kv, min_sparse_len=8000, **buffers)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([1, 300, 40], [9000, 3, 7999], [0, 8000, 5000], [9024] * 3):
        caches.cache_seqlens.copy_(torch.tensor(lengths))
        table = caches.block_table
        table.copy_(table.flatten()[torch.randperm(table.numel(), device="cuda")].view_as(table))
        q.normal_()
        for t in buffers.values():
            t.fill_(torch.nan)
        eager = {name: t.clone() for name, t in buffers.items()}
        dense_attention(q, *caches.kv, min_sparse_len=8000, **eager)
        graph.replay()
        for name, t in buffers.items():
            assert_equal(t, eager[name])
            assert [bool(left) for left in t.flatten(1).isnan().any(1)] == [
                length >= 8000 for length in lengths
            ]


@gpu_only
def test_lengths_and_pages_out_of_range_touch_nothing():
    caches = make_caches([40, 40, 40], device="cuda")
    q = random_vectors(3, 2, 6, 64, dtype=torch.float16, device="cuda")
    caches.cache_seqlens.copy_(torch.tensor([-3, 2**31 - 1, caches.capacity + 2]))
    caches.block_table.copy_(torch.tensor([[-1] * 3, [2**31 - 1] * 3, [len(caches.k_cache)] * 3]))
    out, lse = dense_attention(q, *caches.kv)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
