"""What holds for every operator: one signature, whole outputs, no wider than the cache, no grad."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import hata
from closeness import assert_equal
from error_cases import arguments
from hata import reference

OPS = [
    "hash_encode",
    "encode_query",
    "cache_append",
    "hamming_score",
    "select_topk",
    "score_select",
    "gather_attention",
    "merge_attention_states",
    "decode_step",
]
BUFFERS = {"workspace", "indices", "num_selected", "out", "lse"}  # of decode_step


def outputs(op: str, arguments: dict[str, Any]) -> list[Tensor]:
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
    buffers = BUFFERS if op == "decode_step" else set()
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
