"""A captured step replays with other lengths, pages and contents, as an eager call would run."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import hata
from cases import poisoned, random_vectors
from closeness import assert_equal, assert_same_caches
from decode_cases import DecodeCase, make_decode_case
from devices import gpu_only

pytestmark = gpu_only

LONG = 313 * 64  # whole pages, which can be permuted
LENGTHS = [[200, 153, 64], [1, 2, 3], [0, 200, 17], [199, 8, 0], [200, 200, 200]]


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # what a first call sets up may not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def full_case(**shape) -> DecodeCase:
    """Caches whose every page can be read: the captured buffers serve any lengths."""
    return make_decode_case([208, 208, 208], device="cuda", **shape)


def buffers_of(case: DecodeCase, top_k: int) -> dict[str, torch.Tensor]:
    batch, q_len, num_heads, head_dim = case.q.shape
    num_kv_heads = case.k.shape[2]
    sizes = (batch, q_len, num_heads, num_kv_heads, head_dim, case.caches.capacity, top_k)
    rows, heads = (batch, q_len, num_kv_heads), (batch, q_len, num_heads)
    return {
        "workspace": poisoned(hata.workspace_size(*sizes), dtype=torch.uint8, device="cuda"),
        "indices": poisoned(*rows, top_k, dtype=torch.int32, device="cuda"),
        "num_selected": poisoned(*rows, dtype=torch.int32, device="cuda"),
        "out": poisoned(*heads, head_dim, dtype=case.q.dtype, device="cuda"),
        "lse": poisoned(*heads, dtype=torch.float32, device="cuda"),
    }


def change(case: DecodeCase, lengths: list[int]) -> None:
    """New lengths, new tokens, pages in another order: all in the captured buffers."""
    case.caches.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
    table = case.caches.block_table
    table.copy_(table.flatten()[torch.randperm(table.numel(), device="cuda")].view_as(table))
    for t in (case.q, case.k, case.v):
        t.copy_(random_vectors(*t.shape, dtype=t.dtype, device="cuda"))


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize(("q_len", "top_k"), [(1, 16), (4, 16), (1, 190)])
def test_decode_step(algorithm, q_len, top_k, key_norms):
    case = full_case(q_len=q_len, top_k=top_k, key_norms=key_norms)
    buffers = buffers_of(case, top_k)
    graph = capture(lambda: case.run(**buffers))
    for lengths in LENGTHS:
        change(case, lengths)
        assert_replays(graph, case, buffers)


def assert_replays(
    graph: torch.cuda.CUDAGraph, case: DecodeCase, buffers: dict[str, torch.Tensor]
) -> None:
    """A replay gives what an eager step on a copy of the caches gives, and leaves the same."""
    eager = case.clone()
    expected = eager.run()
    graph.replay()
    for name, e in expected._asdict().items():
        assert_equal(buffers[name], e)
    assert_same_caches(case.caches, eager.caches)


@pytest.mark.parametrize("key_norms", [False, True])
@pytest.mark.parametrize("share", [None, 1 / 64])
@pytest.mark.parametrize("captured", [[1, 2, 3], [LONG] * 3])
def test_lengths_far_from_those_of_the_capture(algorithm, captured, share, key_norms):
    shape = {"page_size": 64, "top_k": 300, "top_k_share": share, "key_norms": key_norms}
    case = make_decode_case([LONG] * 3, device="cuda", **shape)
    buffers = buffers_of(case, 300)
    change(case, captured)
    graph = capture(lambda: case.run(**buffers))
    for lengths in ([1, 300, 40], [LONG, 3, 9000], [0, 301, 12_345], [LONG] * 3):
        change(case, lengths)
        assert_replays(graph, case, buffers)


def test_replays_after_the_cache_has_grown(algorithm):
    """Fifty tokens decoded by one graph, against fifty eager steps."""
    case = full_case()
    case.caches.cache_seqlens.copy_(torch.tensor([1, 40, 150], dtype=torch.int32))
    eager = case.clone()
    buffers = buffers_of(case, 16)
    graph = capture(lambda: case.run(**buffers))
    for _ in range(50):
        for t in (case.q, case.k, case.v):
            t.normal_()
        graph.replay()
        for name, e in eager.run()._asdict().items():
            assert_equal(buffers[name], e)
        case.caches.cache_seqlens.add_(1)
        eager.caches.cache_seqlens.add_(1)


def test_every_operator_in_one_graph(algorithm):
    """The step taken apart; no operator waits, or the capture would fail."""
    case = full_case(key_norms=True)
    caches, scored = case.caches, {"weight_sum": hata.plane_weight_sum(4, 3)}
    budget = {"top_k": 16, "num_sink": 2, "num_recent": 4}
    captured: dict[str, tuple[torch.Tensor, ...]] = {}

    def step() -> None:
        fresh = hata.hash_encode(case.k, case.key_weights, key_norms=True)
        hata.cache_append(case.k, case.v, case.key_weights, *caches.all)
        planes = hata.encode_query(case.q, case.query_weights, query_bits=4)
        scores = hata.hamming_score(planes, *caches.codes, max_seq_len=caches.capacity, **scored)
        selected = hata.select_topk(scores, caches.cache_seqlens, **budget)
        fused = hata.score_select(planes, *caches.codes, **scored, **budget)
        attended = hata.gather_attention(case.q, *caches.kv, selected[0])
        dense = hata.dense_attention(case.q, *caches.kv)
        merged = hata.merge_attention_states(*attended, *dense)
        captured.update(
            **{"fresh": fresh, "selected": selected, "fused": fused},
            **{"attended": attended, "dense": dense, "merged": merged},
        )

    graph = capture(step)
    for lengths in LENGTHS:
        change(case, lengths)
        whole = case.clone().run()
        graph.replay()
        # Not the step's attention: it adds up the same terms in another order.
        attended = hata.gather_attention(case.q, *caches.kv, whole.indices)
        dense = hata.dense_attention(case.q, *caches.kv)
        expected = {
            "fresh": hata.hash_encode(case.k, case.key_weights, key_norms=True),
            "selected": (whole.indices, whole.num_selected),
            "fused": (whole.indices, whole.num_selected),
            "attended": attended,
            "dense": dense,
            "merged": hata.merge_attention_states(*attended, *dense),
        }
        for name, tensors in expected.items():
            for a, e in zip(captured[name], tensors, strict=True):
                assert_equal(a, e)


def test_runs_on_the_current_stream():
    """The queries arrive late, on a stream of their own: a kernel elsewhere would see zeros."""
    case = full_case()
    expected = case.clone().run()
    late = replace(case, q=torch.zeros_like(case.q))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.q.copy_(case.q)
        result = late.run()
    torch.cuda.current_stream().wait_stream(stream)
    for a, e in zip(result, expected, strict=True):
        assert_equal(a, e)
