from typing import Any

import pytest
import torch

from cases import LAYOUTS, poisoned
from closeness import assert_equal, assert_no_worse_than_pytorch, plain_gather_attention
from decode_cases import DecodeCase, make_decode_case
from devices import algorithms, gpu_only
from hata import (
    DecodeStepOutput,
    cache_append,
    decode_step,
    encode_query,
    plane_weight_sum,
    reference,
    workspace_size,
)

has_grid = pytest.mark.skipif("grid" not in algorithms("cuda"), reason="needs a GPU with clusters")

SEQ_LENS = [153, 8, 5, 0, 64]  # with fewer positions than query tokens, too


def assert_steps(case: DecodeCase) -> DecodeStepOutput:
    """The caches as cache_append leaves them, the reference's selection, and attention over it."""
    expected, before = case.caches.clone(), case.caches
    cache_append(case.k, case.v, case.key_weights, *expected.all)
    cut = case.cut_buffers()
    result = case.run(**cut)
    for name in ("k_cache", "v_cache", "code_cache", "norm_cache"):
        if getattr(before, name) is not None:
            assert_equal(getattr(before, name), getattr(expected, name))

    settings = dict(case.settings)
    query_bits = settings.pop("query_bits")
    group = case.q.shape[2] // case.k.shape[2]
    indices, num_selected, *expected_cut = reference.score_select(
        encode_query(case.q, case.query_weights, query_bits=query_bits),
        *expected.codes,
        weight_sum=plane_weight_sum(query_bits, group),
        **settings,
        return_cut=True,
    )
    assert_equal(result.indices, indices)
    assert_equal(result.num_selected, num_selected)
    for a, e in zip(cut.values(), expected_cut, strict=True):
        assert_equal(a, e)

    truth = reference.gather_attention(case.q.double(), *expected.double().kv, indices)
    plain = plain_gather_attention(case.q, *expected.kv, indices)
    assert_no_worse_than_pytorch(result.out, plain[0], truth[0])
    assert_no_worse_than_pytorch(result.lse, plain[1], truth[1])
    return result


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64, None])
def test_matches_the_reference(device, algorithm, page_size, layout, key_norms):
    shape = {"page_size": page_size, "layout": layout, "key_norms": key_norms}
    assert_steps(make_decode_case(SEQ_LENS, device=device, q_len=2, **shape))


@pytest.mark.parametrize("query_bits", [1, 2, 3, 4])
def test_any_query_bits_and_dtype(device, dtype, query_bits):
    assert_steps(make_decode_case([90, 20], device=device, dtype=dtype, query_bits=query_bits))


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 12, 16, 20])
@pytest.mark.parametrize("query_bits", [1, 4])
def test_any_group_size(device, group, query_bits):
    shape = {"group": group, "query_bits": query_bits}
    assert_steps(make_decode_case([90, 20], device=device, dtype=torch.bfloat16, **shape))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("num_bits", [32, 96, 128, 160, 224, 256])
def test_any_head_dim_and_number_of_bits(device, head_dim, num_bits):
    assert_steps(make_decode_case([70, 33], device=device, head_dim=head_dim, num_bits=num_bits))


@pytest.mark.parametrize("q_len", range(1, 9))
def test_any_number_of_query_tokens(device, algorithm, q_len):
    assert_steps(make_decode_case(SEQ_LENS, device=device, q_len=q_len, key_norms=True))


@pytest.mark.parametrize("top_k", [6, 7, 100, 500])
def test_any_budget(device, algorithm, top_k):
    assert_steps(make_decode_case([300, 90], device=device, top_k=top_k))


# Groups and head_dims that teams of one to four warps attend over in the fused step.
TEAMS = [(12, 64), (16, 96), (9, 128), (1, 192), (4, 256), (16, 256)]


@pytest.mark.parametrize(("group", "head_dim"), TEAMS)
def test_wide_groups_and_rows(device, algorithm, group, head_dim):
    shape = {"group": group, "head_dim": head_dim, "dtype": torch.bfloat16, "top_k": 300}
    assert_steps(make_decode_case([1100, 0, 305, 5], device=device, **shape))


@has_grid
def test_a_step_is_one_launch():
    cases = [
        make_decode_case([400, 90], device="cuda", group=group, head_dim=head_dim)
        for group, head_dim in [(1, 64), (8, 128), *TEAMS]
    ]
    for case in cases:
        case.run()  # asks the device what it can do
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for case in cases:
            case.run()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("decode_step_kernel" in name for name in names) == len(cases)
    assert not [name for name in names if "attention" in name]


@gpu_only
@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize(("group", "head_dim"), [(2, 128), (16, 128), (3, 256)])
@pytest.mark.parametrize("num_kv_heads", [1, 9, 12, 20, 30, 40, 50, 70, 140])
def test_any_cluster(num_kv_heads, group, head_dim, key_norms):
    """More heads, fewer blocks for each: clusters of eight to one."""
    shape = {"group": group, "head_dim": head_dim, "dtype": torch.bfloat16, "key_norms": key_norms}
    shape |= {"num_kv_heads": num_kv_heads, "top_k": 150}
    assert_steps(make_decode_case([1500], device="cuda", **shape))


@gpu_only
@pytest.mark.parametrize("head_dim", [128, 256])
def test_more_positions_than_a_block_keeps(head_dim):
    shape = {"num_kv_heads": 140, "group": 1, "head_dim": head_dim, "dtype": torch.bfloat16}
    assert_steps(make_decode_case([9000], device="cuda", top_k=7000, page_size=None, **shape))


@gpu_only
@pytest.mark.parametrize("seq_lens", [[15_000], [7000, 9000], [16_000, 3, 900]])
def test_half_of_the_pairs_scan_late(seq_lens):
    """Codes enough for it; the pairs of a sequence that is longer than most do not wait."""
    shape = {"num_kv_heads": 60, "group": 1, "num_bits": 256, "key_norms": True, "top_k": 150}
    assert_steps(make_decode_case(seq_lens, device="cuda", dtype=torch.bfloat16, **shape))


def grid_case(monkeypatch: pytest.MonkeyPatch, seq_lens: list[int], **shape: Any) -> DecodeCase:
    """A step in which the blocks of the whole grid share the (sequence, KV head) pairs."""
    monkeypatch.setenv("HATA_SCORE_SELECT", "grid")
    defaults = {"dtype": torch.bfloat16, "head_dim": 128, "num_kv_heads": 1, "page_size": 64}
    return make_decode_case(seq_lens, device="cuda", **{**defaults, **shape})


@has_grid
@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 5, 8, 10])
def test_a_grid_of_any_number_of_pairs(monkeypatch, num_kv_heads, key_norms):
    """Of which each has a few clusters of eight blocks, or of four."""
    shape = {"num_kv_heads": num_kv_heads, "group": 2, "top_k": 150, "key_norms": key_norms}
    assert_steps(grid_case(monkeypatch, [1500], **shape))


@has_grid
def test_a_grid_whose_blocks_all_serve_one_pair(monkeypatch):
    shape = {"group": 2, "head_dim": 64, "num_bits": 32, "top_k": 2000}
    assert_steps(grid_case(monkeypatch, [600_000], **shape))


@has_grid
@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize(("group", "head_dim"), [(3, 128), (16, 128), (4, 256)])
def test_a_grid_of_sequences_of_any_lengths(monkeypatch, group, head_dim, key_norms):
    lengths = [20_001, 33, 9000, 1, 0, 700]
    shape = {"group": group, "head_dim": head_dim, "top_k": 300, "key_norms": key_norms}
    assert_steps(grid_case(monkeypatch, lengths, **shape))


@has_grid
@pytest.mark.parametrize("key_norms", [False, True])
def test_a_grid_gives_ties_to_the_most_recent(monkeypatch, key_norms):
    case = grid_case(monkeypatch, [9000, 5000], top_k=500, key_norms=key_norms)
    case.caches.code_cache.zero_()
    if key_norms:
        case.caches.norm_cache.fill_(1)
    assert_steps(case)


@has_grid
@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize(("num_recent", "head_dim"), [(4, 128), (2900, 128), (4, 256)])
def test_a_grid_evens_out_a_selection_that_lies_in_a_few_slices(
    monkeypatch, num_recent, head_dim, key_norms
):
    shape = {"num_recent": num_recent, "head_dim": head_dim, "top_k": 3000, "key_norms": key_norms}
    case = grid_case(monkeypatch, [40_000], **shape)
    codes = case.caches.code_cache
    few = case.caches.block_table[0, 300:350].long()
    kept = codes[few].clone()
    codes.zero_()
    codes[few] = kept
    assert_steps(case)


@has_grid
def test_a_grid_expects_nothing_of_its_workspace(monkeypatch):
    """Steps of other shapes have written there."""
    cases = [
        grid_case(monkeypatch, [5000], top_k=100),
        grid_case(monkeypatch, [3000, 700], num_kv_heads=3, top_k=64),
    ]
    expected = [case.run() for case in cases]
    workspace = poisoned(1 << 24, dtype=torch.uint8, device="cuda")
    for _ in range(50):
        for case, e in zip(cases, expected, strict=True):
            for again, once in zip(case.run(workspace=workspace), e, strict=True):
                assert_equal(again, once)


@has_grid
def test_grids_in_two_streams(monkeypatch):
    cases = [grid_case(monkeypatch, [20_000], top_k=300) for _ in range(2)]
    expected = [case.run() for case in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    torch.cuda.synchronize()
    for _ in range(100):
        results = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.run())
    torch.cuda.synchronize()
    for result, e in zip(results, expected, strict=True):
        for together, alone in zip(result, e, strict=True):
            assert_equal(together, alone)


def test_equals_dense_attention_where_everything_fits_the_budget(device, dtype):
    case = make_decode_case([120, 120], device=device, dtype=dtype, q_len=3, top_k=120)
    result = assert_steps(case)
    dense = torch.arange(120, dtype=torch.int32, device=device).expand(2, 3, 2, -1)
    truth = reference.gather_attention(case.q.double(), *case.caches.double().kv, dense)
    plain = plain_gather_attention(case.q, *case.caches.kv, dense)
    assert_no_worse_than_pytorch(result.out, plain[0], truth[0])
    assert_no_worse_than_pytorch(result.lse, plain[1], truth[1])


def test_softmax_scale(device):
    case = make_decode_case([90], device=device)
    cold = case.run(softmax_scale=0.0)
    counts = torch.full((1, 1, 6), 16.0, device=device).log()
    torch.testing.assert_close(cold.lse, counts, rtol=2**-22, atol=0)  # two float32 roundings


@pytest.mark.parametrize("head_dim", [64, 256])
def test_softcap(device, dtype, algorithm, head_dim):
    shape = {"dtype": dtype, "head_dim": head_dim, "top_k": 40}
    case = make_decode_case([90, 300], device=device, **shape)
    case.q.mul_(15)
    result = case.run(softcap=5.0)
    kv, double_kv = case.caches.kv, case.caches.double().kv
    truth = reference.gather_attention(case.q.double(), *double_kv, result.indices, softcap=5.0)
    plain = plain_gather_attention(case.q, *kv, result.indices, softcap=5.0)
    assert_no_worse_than_pytorch(result.out, plain[0], truth[0])
    assert_no_worse_than_pytorch(result.lse, plain[1], truth[1])


def test_does_not_depend_on_the_batch_or_the_launch(device, dtype, algorithm):
    case = make_decode_case([400, 90, 211], device=device, dtype=dtype, q_len=2, top_k=64)
    first = case.run()
    for _ in range(3):
        for again, once in zip(case.run(), first, strict=True):
            assert_equal(again, once)
    tables = case.caches.all[4:]
    for b in range(3):
        row = slice(b, b + 1)
        alone = decode_step(
            *(x[row] for x in (case.q, case.k, case.v)),
            case.key_weights,
            case.query_weights,
            *case.caches.all[:4],
            *(x[row] for x in tables),
            **case.settings,
        )
        assert_equal(alone.indices, first.indices[row])
        assert_equal(alone.num_selected, first.num_selected[row])


@pytest.mark.parametrize("top_k", [100, 200])
def test_writes_all_of_poisoned_buffers(device, dtype, algorithm, top_k):
    case = make_decode_case(SEQ_LENS, device=device, dtype=dtype, q_len=2, top_k=top_k)
    expected = case.clone().run()
    width = min(top_k, case.caches.capacity)
    size = workspace_size(5, 2, 6, 2, 64, case.caches.capacity, top_k)
    buffers = {
        "workspace": poisoned(size, dtype=torch.uint8, device=device),
        "indices": poisoned(5, 2, 2, width, dtype=torch.int32, device=device),
        "num_selected": poisoned(5, 2, 2, dtype=torch.int32, device=device),
        "out": poisoned(5, 2, 6, 64, dtype=dtype, device=device),
        "lse": poisoned(5, 2, 6, dtype=torch.float32, device=device),
    }
    result = case.run(**buffers)
    for name, buffer in result._asdict().items():
        assert buffer is buffers[name]
        assert_equal(buffer, getattr(expected, name))


def test_accepts_an_empty_batch(device, algorithm):
    case = make_decode_case([20], device=device)
    none = slice(0, 0)
    result = decode_step(
        *(x[none] for x in (case.q, case.k, case.v)),
        case.key_weights,
        case.query_weights,
        *case.caches.all[:4],
        *(x[none] for x in case.caches.all[4:]),
        **case.settings,
    )
    assert result.out.shape == (0, 1, 6, 64)


def test_batch_past_65535(device, algorithm):
    """Seven sequences, each ten thousand times, in pages of its own."""
    case = make_decode_case(
        [9, 5, 1, 0, 9, 3, 8], device=device, group=1, num_kv_heads=1, num_bits=32, top_k=6
    )
    few = case.clone().run()
    times = 10_000
    num_pages = len(case.caches.k_cache)
    first_pages = torch.arange(times, dtype=torch.int32, device=device) * num_pages
    table = (first_pages[:, None, None] + case.caches.block_table).flatten(0, 1)
    large = (t.repeat(times, *[1] * (t.dim() - 1)) for t in case.caches.all[:3])
    many = decode_step(
        *(t.repeat(times, 1, 1, 1) for t in (case.q, case.k, case.v)),
        case.key_weights,
        case.query_weights,
        *large,
        None,
        table,
        case.caches.cache_seqlens.repeat(times),
        **case.settings,
    )
    for a, e in zip(many, few, strict=True):
        assert_equal(a, e.repeat(times, *[1] * (e.dim() - 1)))


def test_workspace_size_grows_with_every_size():
    sizes = {
        "batch": 2,
        "q_len": 1,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "max_seq_len": 1000,
        "top_k": 256,
    }
    size = workspace_size(**sizes)
    for name in sizes:
        assert workspace_size(**{**sizes, name: 20 * sizes[name]}) >= size


@pytest.mark.parametrize("key_norms", [False, True])
def test_opcheck(device, key_norms):
    case = make_decode_case([20, 7], device=device, q_len=2, key_norms=key_norms, top_k=8)
    caches = case.caches
    size = workspace_size(2, 2, 6, 2, 64, caches.capacity, 8)
    torch.library.opcheck(
        torch.ops.hata.decode_step.default,
        (
            *(case.q, case.k, case.v, case.key_weights, case.query_weights),
            *caches.all,
            *(4, 8, 2, 4, 0.5, 7, 0.125),
        ),
        {
            "workspace": torch.zeros(size, dtype=torch.uint8, device=device),
            **case.cut_buffers(),
            "indices": torch.zeros(2, 2, 2, 8, dtype=torch.int32, device=device),
            "num_selected": torch.zeros(2, 2, 2, dtype=torch.int32, device=device),
            "out": torch.zeros_like(case.q),
            "lse": torch.zeros(2, 2, 6, device=device),
        },
    )
