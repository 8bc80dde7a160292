"""What holds for every operator: one signature, whole outputs, no wider than the cache, no grad."""

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import hata
from cases import copy_storage
from closeness import assert_equal
from error_cases import arguments
from hata import reference

OPS = [
    "hash_encode",
    "encode_query",
    "cache_append",
    "cache_write",
    "hamming_score",
    "select_topk",
    "score_select",
    "fetch_rows",
    "gather_attention",
    "dense_attention",
    "merge_attention_states",
    "decode_step",
]
BUFFERS = {  # of the caller
    "dense_attention": {"out", "lse"},
    "fetch_rows": {"slots", "missing", "num_missing"},
    "decode_step": {
        *("workspace", "last_score", "num_ties", "indices", "num_selected", "out", "lse"),
    },
}


def outputs(op: str, given: dict[str, Any]) -> list[Tensor]:
    """What it returns and writes, on copies of what is given."""
    arguments = {k: copy_storage(v) if isinstance(v, Tensor) else v for k, v in given.items()}
    result = getattr(hata, op)(**arguments)
    result = result if isinstance(result, tuple) else (result,)
    caches = [arguments[name] for name in arguments if name.endswith("cache")]
    return [t for t in (*result, *caches) if isinstance(t, Tensor)]


@pytest.mark.parametrize("op", OPS)
def test_arguments_have_one_order(op):
    schema = getattr(torch.ops.hata, op).default._schema
    names = [argument.name for argument in schema.arguments]
    wrapper = list(inspect.signature(getattr(hata, op)).parameters.values())
    assert [p.name for p in wrapper] == names
    plain = list(inspect.signature(getattr(reference, op)).parameters.values())
    buffers = BUFFERS.get(op, set())
    assert [p.name for p in plain] == [name for name in names if name not in buffers]
    kinds = {p.name: (p.kind, p.default) for p in wrapper}
    assert all(kinds[p.name] == (p.kind, p.default) for p in plain)


@pytest.mark.parametrize("op", OPS)
def test_writes_all_of_its_output(device, op, monkeypatch):
    """Also where the memory that it allocates, outputs and workspace, is full of NaN before."""
    given = arguments(op, device)
    expected = [t.clone() for t in outputs(op, given)]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9).isnan().all()
        actual = outputs(op, given)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e)


@pytest.mark.parametrize("op", ["select_topk", "score_select", "decode_step"])
def test_a_budget_for_everything_is_no_wider_than_the_cache(device, op):
    """top_k = 2^30 would be gigabytes of indices, most of them -1; fake kernels say the same."""
    given = arguments(op, device)  # 48 positions at most
    narrow = getattr(hata, op)(**{**given, "top_k": 48})
    given |= {"top_k": 2**30, "num_sink": 2**29, "num_recent": 2**29}
    wide = getattr(hata, op)(**given)
    for a, e in zip(wide, narrow, strict=True):
        assert_equal(a, e)
    for a, e in zip(getattr(reference, op)(**given), narrow, strict=True):
        assert a.shape == e.shape
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in given.items()}
        for a, e in zip(getattr(hata, op)(**fake), narrow, strict=True):
            assert (a.shape, a.dtype) == (e.shape, e.dtype)


def test_a_workspace_for_everything_is_no_larger_than_for_the_capacity():
    sizes = (2, 1, 6, 2, 64, 480)
    assert hata.workspace_size(*sizes, 2**30) == hata.workspace_size(*sizes, 480)


@pytest.mark.parametrize("op", OPS)
def test_refuses_tensors_that_require_a_gradient(device, op):
    given = arguments(op, device)
    for name, t in given.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            continue
        wanted = {**given, name: t.detach().requires_grad_()}
        message = (
            f"hata.{op}: {name} must not require a gradient (hata is inference only: call it under "
            "torch.no_grad()), got requires_grad=True"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(hata, op)(**wanted)
        with torch.no_grad():
            getattr(hata, op)(**wanted)


@pytest.mark.parametrize("op", OPS)
def test_builds_no_graph(device, op):
    """Called without the wrapper, where it could not say so before backward()."""
    given = arguments(op, device)
    if op in ("fetch_rows", "decode_step"):
        given |= getattr(hata, op)(**given)._asdict()
    elif op == "dense_attention":
        given |= dict(zip(("out", "lse"), hata.dense_attention(**given), strict=True))
    for name, t in given.items():
        if isinstance(t, Tensor) and t.is_floating_point():
            given[name] = t.detach().requires_grad_(name not in ("out", "lse"))
    result = getattr(torch.ops.hata, op)(**given)
    for t in (result,) if isinstance(result, Tensor) else result or ():
        assert not t.requires_grad
    for name in ("out", "lse"):
        assert name not in given or not given[name].requires_grad
