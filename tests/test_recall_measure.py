"""`hata.recall.measure` against the definitions, token by token and head by head."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capture_cases import NUM_LAYERS, NUM_QUERIES, SEQ_LEN, SHAPE, make_captures
from hata import HashWeights
from hata.recall.measure import Results, measure
from hata.recall.options import MeasureOptions
from hata.selectors import (
    ExactSelector,
    H2oSelector,
    HataSelector,
    QuestSelector,
    Selector,
    SnapkvSelector,
    VattentionSelector,
    rank,
)
from hata.selectors.quality import Quality
from hata.training.captures import Captures

BUDGETS = (8, 24, 60)
SINKS = {"num_sink": 2, "num_recent": 3}


def options(device: str, **changes: object) -> MeasureOptions:
    return MeasureOptions(**{"top_k": list(BUDGETS), "device": device, **SINKS, **changes})


def selectors() -> list[Selector]:
    weights = HashWeights.random(**SHAPE, num_bits=64)
    return [ExactSelector(), HataSelector(weights), QuestSelector(8)]


def by_definition(captures: Captures, layer_idx: int, selector: Selector, device: str) -> Quality:
    """Every figure from float64 attention over an explicit set of positions."""
    layer = captures.layer(layer_idx, with_values=True)
    group, softcap, sinks = captures.info.group, captures.info.softcap, layer.softmax.sink_logits
    sums = torch.zeros(3, captures.info.num_kv_heads, len(BUDGETS), dtype=torch.float64)
    for b in range(captures.info.num_sequences):
        k, v, positions = layer.k[b], layer.v[b], layer.positions[b].to(device)
        q = layer.q[b].unflatten(1, (-1, group)).float().to(device)
        orders = []
        for each in (selector, ExactSelector()):
            score = each.index(layer_idx, k.to(device), layer.softmax.to(torch.device(device)))
            scores = score(q, positions)
            orders.append(rank(scores, positions, 60, page_size=each.page_size, **SINKS).cpu())
        for i, last in enumerate(positions.tolist()):
            for h in range(captures.info.num_kv_heads):
                for n, budget in enumerate(BUDGETS):
                    found, best = ({t for t in x[i, h, :budget].tolist() if t >= 0} for x in orders)
                    sums[0, h, n] += len(found & best) / len(best)
                    for g in range(group):
                        logits = k[: last + 1, h].double() @ q[i, h, g].double().cpu()
                        logits = logits * captures.info.softmax_scale
                        if softcap is not None:
                            logits = softcap * torch.tanh(logits / softcap)
                        sink = -torch.inf if sinks is None else float(sinks[h, g])
                        sink_share = torch.sigmoid(sink - logits.logsumexp(0))
                        shares = logits.softmax(0) * (1 - sink_share)
                        dense = shares @ v[: last + 1, h].double()
                        rows = sorted(found)
                        mass = shares[rows].sum() + sink_share
                        out = shares[rows] @ v[rows, h].double() / mass
                        sums[1, h, n] += mass / group
                        sums[2, h, n] += (out - dense).norm() / dense.norm() / group
    return Quality(*sums / (captures.info.num_sequences * NUM_QUERIES))


@pytest.mark.parametrize("logits", [{}, {"softcap": 4.0, "sinks": True}], ids=["plain", "both"])
def test_measures_what_it_says(
    tmp_path: Path, device: str, dtype: torch.dtype, logits: dict[str, Any]
) -> None:
    name = str(dtype).removeprefix("torch.")
    captures = make_captures(tmp_path / "captures", dtype=name, **logits)
    for measurement in measure(captures, selectors(), options(device)):
        assert len(measurement.layers) == NUM_LAYERS
        for layer_idx, found in enumerate(measurement.layers):
            expected = by_definition(captures, layer_idx, measurement.selector, device)
            torch.testing.assert_close(found.recall, expected.recall)
            # float32 softmax and products of 200 terms against float64
            for name in ("attention_mass", "output_error"):
                a, b = getattr(found, name), getattr(expected, name)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_exact_selection_is_the_bound(tmp_path: Path, device: str) -> None:
    captures = make_captures(tmp_path / "captures")
    exact, *others = measure(captures, selectors(), options(device))
    for layer in exact.layers:
        assert (layer.recall == 1).all()
    for other in others:
        for best, layer in zip(exact.layers, other.layers, strict=True):
            assert (layer.attention_mass <= best.attention_mass + 1e-6).all()


def test_everything_selected_is_dense_attention(tmp_path: Path, device: str) -> None:
    captures = make_captures(tmp_path / "captures")
    everything = options(device, top_k=[SEQ_LEN, 2 * SEQ_LEN])
    for measurement in measure(captures, selectors(), everything):
        for layer in measurement.layers:
            one = torch.ones_like(layer.recall)
            assert (layer.recall == 1).all()
            torch.testing.assert_close(layer.attention_mass, one, rtol=1e-5, atol=0)
            assert layer.output_error is not None
            assert (layer.output_error < 1e-5).all()  # float32 rounding of 200 terms


def test_the_memory_limit_changes_nothing(tmp_path: Path, device: str) -> None:
    captures = make_captures(tmp_path / "captures")
    some = [*selectors(), SnapkvSelector(4, 3), H2oSelector(), VattentionSelector(ExactSelector())]
    whole = measure(captures, some, options(device))
    parts = measure(captures, some, options(device, memory_limit_gb=1e-6))
    again = measure(captures, some, options(device))
    for a, b, c in zip(whole, parts, again, strict=True):
        for x, y, z in zip(a.layers, b.layers, c.layers, strict=True):
            torch.testing.assert_close(x.recall, y.recall, rtol=1e-12, atol=0)  # float64
            # float32 products of 200 terms, summed in another order
            torch.testing.assert_close(x.attention_mass, y.attention_mass, rtol=1e-5, atol=0)
            torch.testing.assert_close(x.output_error, y.output_error, rtol=1e-5, atol=0)
            assert torch.equal(x.attention_mass, z.attention_mass)
            assert torch.equal(x.output_error, z.output_error)


def test_without_values_there_is_no_output_error(tmp_path: Path, device: str) -> None:
    captures = make_captures(tmp_path / "captures", values=False)
    measurement = measure(captures, [ExactSelector()], options(device))[0]
    assert measurement.layers[0].output_error is None
    results = Results(captures.info, [measurement], BUDGETS, num_dense_layers=1)
    assert results.means(measurement, "output_error") is None
    assert results.means(measurement, "recall") == [1.0] * len(BUDGETS)


def test_some_queries_are_evenly_spaced_ones(tmp_path: Path, device: str) -> None:
    captures = make_captures(tmp_path / "captures", num_sequences=1)

    class Few:
        info = captures.info

        def layer(self, layer_idx: int, *, with_values: bool) -> object:
            found = captures.layer(layer_idx, with_values=with_values)
            return replace(found, q=found.q[:, [0, 3, 6]], positions=found.positions[:, [0, 3, 6]])

    some = measure(captures, [ExactSelector()], options(device, num_queries=3))[0]
    few = measure(Few(), [ExactSelector()], options(device))[0]  # type: ignore[arg-type]
    for a, b in zip(some.layers, few.layers, strict=True):
        assert torch.equal(a.attention_mass, b.attention_mass)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": [8, 4]}, "top_k must be at least num_sink \\+ num_recent=5, got 4"),
        ({"num_sink": -1}, "num_sink must be at least 0, got -1"),
        ({"num_recent": -1}, "num_recent must be at least 0, got -1"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"memory_limit_gb": 0.0}, "memory_limit_gb must be positive, got 0"),
    ],
)
def test_rejects_a_broken_rule(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options("cpu", **changes).budgets(SEQ_LEN)
