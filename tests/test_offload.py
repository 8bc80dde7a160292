"""A cache in host memory holds, selects and attends as its twin on the device does."""

import copy
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hata
from attention_model import FEW, queries
from cache_model import (
    NUM_LAYERS,
    WITH_NORMS,
    CacheModel,
    assert_unchanged,
    contents,
    make_cache,
    new_tokens,
)
from closeness import assert_equal
from devices import gpu_only
from hata import HataCache, HataConfig, ops
from hata.host_memory import HostMemory, release_host_memory
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import enable
from hata.integrations.transformers_cache import CACHE_ARGUMENT
from hata.offload import OffloadedCache
from tiny_models import FEW as FEW_OF_MODEL
from tiny_models import generate, make_model, random_prompt

SPARSE = HataConfig(top_k=9, num_sink=2, num_recent=3, num_dense_layers=0, min_sparse_len=0)

ROOM = 1 << 20  # bytes of host memory


@pytest.mark.parametrize("seed", range(2))
def test_any_sequence_of_calls_keeps_every_token(device: str, seed: int) -> None:
    shape: dict[str, Any] = {"page_size": 4, "num_pages": 40, "host_memory": ROOM}
    cache = make_cache(device, torch.float16, weights=WITH_NORMS, config=SPARSE, **shape)
    model, draw = CacheModel(cache), random.Random(seed)
    for _ in range(20):
        lengths = model.lengths
        q_len = draw.randint(0, min(cache.max_seq_len - max(lengths), 12))
        call = draw.choice(["append", "ragged", "truncate", "reorder"])
        if call == "append":
            model.append(q_len)
        elif call == "ragged":
            model.append(q_len, [draw.randint(0, q_len) for _ in lengths])
        elif call == "truncate":
            model.truncate([draw.randint(0, n) for n in lengths])
        else:
            model.reorder([draw.randrange(cache.batch) for _ in lengths])
        model.check()


class Twins:
    """The same calls on a cache in host memory and on one on the device."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        config: HataConfig,
        kv_cache_dtype: torch.dtype | None = None,
        **offload: int,
    ) -> None:
        shape: dict[str, Any] = {"page_size": 4, "max_seq_len": 64, "config": config}
        shape["kv_cache_dtype"] = kv_cache_dtype
        shape["record_cuts"] = True
        self.offloaded = make_cache(device, dtype, **shape, host_memory=ROOM, **offload)
        self.resident = make_cache(device, dtype, **shape)
        if kv_cache_dtype is not None:
            for cache in self:
                for scale in (*cache.k_scale, *cache.v_scale):
                    scale.copy_(torch.linspace(0.7, 1.9, len(scale)))

    def __iter__(self) -> Iterator[HataCache]:
        yield from (self.offloaded, self.resident)

    def prefill(self, q_len: int, new: list[int]) -> None:
        for layer_idx in range(NUM_LAYERS):
            qkv = (queries(self.resident, q_len), *new_tokens(self.resident, q_len))
            outs = [hata.prefill(*qkv, c, layer_idx, new_seqlens=new) for c in self]
            assert_equal(*outs)

    def decode(self, q_len: int) -> None:
        """Selections are equal, and so is attention over them, wherever the rows were."""
        for layer_idx in range(NUM_LAYERS):
            qkv = (queries(self.resident, q_len), *new_tokens(self.resident, q_len))
            out, expected = (hata.decode_attention(*qkv, c, layer_idx) for c in self)
            if layer_idx < self.resident.config.num_dense_layers:
                assert_equal(out, expected)
                continue
            (indices, counts), selected = (c.last_selection(layer_idx) for c in self)
            assert_equal(indices, selected[0])
            assert_equal(counts, selected[1])
            for a, e in zip(*(c.last_cut(layer_idx) for c in self), strict=True):
                assert_equal(a, e)
            eps = torch.finfo(out.dtype).eps
            torch.testing.assert_close(out, expected, rtol=4 * eps, atol=4 * eps)
            if self.offloaded.row_cache is not None:
                assert_equal(out, self.gathered(qkv[0], layer_idx, indices))

    def check_contents(self) -> None:
        for layer_idx, b in itertools.product(range(NUM_LAYERS), range(self.resident.batch)):
            for pair in zip(*(c.keys_values(layer_idx, b) for c in self), strict=True):
                assert_equal(*pair)

    def gathered(self, q: Tensor, layer_idx: int, indices: Tensor) -> Tensor:
        cache = self.resident
        caches = (cache.k_cache[layer_idx], cache.v_cache[layer_idx])
        tables = (cache.block_table, cache.cache_seqlens)
        parts = [
            ops.gather_attention(
                q[:, j : j + 1],
                *caches,
                *tables,
                indices[:, j : j + 1].contiguous(),
                k_scale=cache.k_scale[layer_idx],
                v_scale=cache.v_scale[layer_idx],
            )
            for j in range(q.shape[1])
        ]
        return torch.cat([out for out, _ in parts], dim=1)


@pytest.mark.parametrize("kv_cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_dense_layers", [0, 1])
@pytest.mark.parametrize("num_slots", [0, 9, 13])
def test_any_sequence_of_calls_decodes_as_on_the_device(
    device: str,
    dtype: torch.dtype,
    num_slots: int,
    num_dense_layers: int,
    kv_cache_dtype: torch.dtype | None,
) -> None:
    """With a row cache so small that its clock goes round within few steps, or none."""
    config = FEW if num_dense_layers else SPARSE
    twins = Twins(device, dtype, config, kv_cache_dtype, num_slots=num_slots)
    draw = random.Random(num_slots)
    twins.prefill(20, [20, 3, 0])
    for _ in range(40):
        lengths = twins.resident.seq_lens
        room = twins.resident.max_seq_len - max(lengths)
        call = draw.choice(["prefill", *["decode"] * 4, "truncate", "reorder", "reset"])
        if call == "prefill" and room > 12:
            twins.prefill(12, [draw.randint(0, 12) for _ in lengths])
        elif call == "decode" and room > 3:
            twins.decode(draw.choice([1, 1, 1, 3]))
        elif call == "truncate":
            kept = [max(0, n - draw.randint(0, 20)) for n in lengths]
            for cache in twins:
                cache.truncate(kept)
        elif call == "reorder":
            order = [draw.randrange(3) for _ in lengths]
            for cache in twins:
                cache.reorder(order)
        elif call == "reset" and draw.random() < 0.1:
            for cache in twins:
                cache.reset()
        twins.check_contents()


def test_rows_that_stay_selected_are_read_once(device: str) -> None:
    config = HataConfig(top_k=64, num_sink=0, num_recent=1, num_dense_layers=0)
    twins = Twins(device, torch.float16, config)
    twins.prefill(20, [20, 20, 20])
    rows = twins.offloaded.row_cache
    assert rows is not None
    for missing in (21, 1, 1):
        twins.decode(1)
        assert rows.num_missing.unique().tolist() == [missing]
    twins.offloaded.truncate(10)
    twins.resident.truncate(10)
    twins.decode(1)
    assert rows.num_missing.unique().tolist() == [1]
    twins.offloaded.reorder([2, 2, 0])
    twins.resident.reorder([2, 2, 0])
    twins.decode(1)
    assert rows.num_missing.unique().tolist() == [1]


def test_a_step_that_failed_leaves_no_row_behind(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = Twins(device, torch.float16, SPARSE)
    twins.prefill(20, [20, 20, 20])
    q, (k, v) = queries(twins.offloaded, 1), new_tokens(twins.offloaded, 1)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "gather_attention", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            hata.decode_attention(q, k, v, twins.offloaded, 0)
    assert twins.offloaded.seq_lens == [20, 20, 20]
    twins.decode(1)


def failing(*args: object, **kwargs: object) -> None:
    raise RuntimeError("out of memory")


def test_what_does_not_fit_is_refused_whole(device: str) -> None:
    page_bytes = 2 * 2 * 2 * 64 * 2 * 16  # two layers' keys and values of 16 positions
    shape: dict[str, Any] = {"page_size": 16, "host_memory": 4 * page_bytes + 99}
    cache = make_cache(device, torch.float16, config=SPARSE, **shape)
    assert cache.num_pages == 4
    CacheModel(cache).append(16)
    before = contents(cache)
    k, v = new_tokens(cache, 17)
    message = (
        r"hata.HataCache.append: sequence lengths must fit into 4 pages of 16 positions, all that "
        r"host_memory=65635 bytes hold, got \[33, 33, 33\], which needs 9"
    )
    with pytest.raises(ValueError, match=message):
        cache.append(0, k, v)
    assert_unchanged(cache, before, [16, 16, 16])


def test_a_system_that_refuses_is_an_error_before_anything_changes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(device, torch.float16, config=SPARSE, page_size=16, host_memory=ROOM)
    CacheModel(cache).append(16)
    before = contents(cache)
    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, "take", failing)
        patch.setattr(HostMemory, "num_taken", 0)
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.extend(1)
    assert_unchanged(cache, before, [16, 16, 16])
    cache.extend(1)

    def no_memory(*args: object, **kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    release_host_memory()
    monkeypatch.setattr("hata.host_memory.mmap.mmap", no_memory)
    monkeypatch.setattr("hata.host_memory._call", no_memory)  # of CUDA's driver
    message = "hata.OffloadedCache: host memory must have room for .* bytes, got .*Cannot allocate"
    with pytest.raises(RuntimeError, match=message):
        make_cache(device, torch.float16, config=SPARSE, host_memory=ROOM, page_size=16)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"host_memory must be at least 1, got 0", {"host_memory": 0}),
        (
            r"host_memory must hold a page of 4 positions, which is 4096 bytes, got 99",
            {"host_memory": 99},
        ),
        (
            r"num_slots must be 0 or at least 9, the positions that a step selects, got 8",
            {"num_slots": 8},
        ),
        (r"num_slots must be in 0..1048576, got -1", {"num_slots": -1}),
    ],
)
def test_rejects(device: str, message: str, arguments: dict[str, int]) -> None:
    given: dict[str, Any] = {"page_size": 4, "host_memory": ROOM, "config": SPARSE, **arguments}
    with pytest.raises(ValueError, match=f"hata.OffloadedCache: {message}"):
        make_cache(device, torch.float16, **given)


def test_some_layer_must_be_sparse_and_nothing_is_copied(device: str) -> None:
    dense = HataConfig(num_dense_layers=2)
    with pytest.raises(ValueError, match=r"num_dense_layers must be below num_layers=2, got 2"):
        make_cache(device, torch.float16, page_size=4, config=dense, host_memory=ROOM)
    cache = make_cache(device, torch.float16, page_size=4, config=SPARSE, host_memory=ROOM)
    with pytest.raises(ValueError, match=r"the cache must not be copied, got copy.deepcopy"):
        copy.deepcopy(cache)


@gpu_only
def test_a_captured_step_reads_what_later_steps_fetch() -> None:
    """Replays find rows that others have put into the row cache, and put in their own."""
    twins = Twins("cuda", torch.bfloat16, SPARSE, num_slots=13)
    twins.prefill(40, [40, 33, 12])
    static = [queries(twins.resident, 1), *new_tokens(twins.resident, 1)]
    outs = []
    graphs = []
    for cache in twins:
        cache.extend(1)
        for layer_idx in range(NUM_LAYERS):
            hata.decode_attention(*static, cache, layer_idx)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([hata.decode_attention(*static, cache, i) for i in range(NUM_LAYERS)])
        graphs.append(graph)
    for _ in range(8):
        for t in static:
            t.copy_(torch.randn_like(t))
        for cache, graph in zip(twins, graphs, strict=True):
            cache.extend(1)
            graph.replay()
            cache.close_step()
        for layer_idx in range(NUM_LAYERS):
            selected = [c.last_selection(layer_idx) for c in twins]
            assert_equal(selected[0][0], selected[1][0])
            expected = twins.gathered(static[0], layer_idx, selected[0][0])
            assert_equal(outs[0][layer_idx], expected)


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_a_model_writes_the_same_text(settings: dict[str, Any]) -> None:
    model, prompt = make_model("llama-group4"), random_prompt(1, 30)
    weights = hata.HashWeights.random(**model_shape(model))
    config = replace(FEW_OF_MODEL, num_dense_layers=1)
    for offload, dtype in (("1MB", None), (1 << 20, torch.float8_e4m3fn)):
        choice = {"weights": weights, "kv_cache_dtype": dtype}
        enable(model, config, **choice)
        expected = generate(model, prompt, 20, **settings)
        cache = enable(model, config, **choice, offload=offload)
        assert_equal(generate(model, prompt, 20, **{CACHE_ARGUMENT: cache}, **settings), expected)
        assert isinstance(cache.hata_cache, OffloadedCache)
        assert cache.hata_cache.host_memory in (10**6, 1 << 20)
        assert cache.hata_cache.k_cache[-1].dtype == (dtype or torch.float32)


@pytest.mark.parametrize(
    ("error", "offload"),
    [(TypeError, 1.5), (TypeError, True), (ValueError, "much"), (ValueError, 0)],
)
def test_enable_takes_bytes_or_a_size(error: type[Exception], offload: Any) -> None:
    model = make_model("llama-group4")
    weights = hata.HashWeights.random(**model_shape(model))
    message = 'transformers.enable: offload must be bytes or a size such as "64GB", got'
    with pytest.raises(error, match=message):
        enable(model, weights=weights, offload=offload)
    rule = "config.num_dense_layers must leave a sparse layer for offload, got 3 of 3"
    with pytest.raises(ValueError, match=rule):
        enable(model, HataConfig(num_dense_layers=9), weights=weights, offload="1GB")
