"""What the benchmarks measure: grids, variants, captured inputs, rows that are appended."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench import decode, grids, timing, variants
from bench.__main__ import app
from bench.buffers import CodePool, KvPool
from bench.cases import CONFIGS, Case, Shape
from bench.checks import check_step
from bench.inputs import Captured, repeat_to
from bench.run import Run
from hata import reference
from hata.cli import run_app

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        run_app(app, "python -m bench", [*args, "--device", "cpu", "--quick"])
    return exit_info.value.code


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def captured_file(tmp_path):
    tensors = {
        "queries": torch.randn(5, 9, 64, dtype=torch.float16),
        "keys": torch.randn(300, 3, 64, dtype=torch.float16),
        "key_weights": torch.randn(3, 64, 128, dtype=torch.float16),
    }
    path = tmp_path / "captured.safetensors"
    save_file(tensors, path)
    return path


def shapes(name: str) -> list[Shape]:
    plan = grids.plan_for(CUDA, [name], quick=False)
    return [shape for sweep in plan.sweeps for shape in sweep.shapes]


def test_the_table_has_the_eight_shapes_and_three_settings():
    assert [str(shape) for shape in shapes("table")] == [
        "1 x 32/8 x 32K",
        "1 x 32/8 x 128K",
        "8 x 32/8 x 32K",
        "8 x 32/8 x 128K",
        "1 x 32/32 x 32K",
        "8 x 32/32 x 32K",
        "1 x 32/32 x 256K",
        "8 x 28/4 x 128K",
    ]
    assert [config.name for config in CONFIGS] == ["A", "B", "C"]


def test_figure5_has_both_axes_of_both_head_layouts():
    found = {(s.batch, s.num_kv_heads, s.seq_len >> 10) for s in shapes("figure5")}
    lengths = (4, 8, 16, 32, 64, 128, 256)
    assert found == {
        *((batch, kv, 32) for batch in (1, 2, 4, 8) for kv in (8, 32)),
        *((1, kv, length) for length in lengths for kv in (8, 32)),
    }


def test_budgets_are_shares_of_the_sequence_and_the_paper_s_is_one_64th():
    assert [s.top_k for s in shapes("budget")[:6]] == [512, 1024, 2048, 4096, 8192, 16384]
    assert Shape(1, 32, 8, 128 << 10).top_k == 2048
    assert Shape(1, 32, 8, 512).top_k == 32  # room for the sink and recent positions


def test_groups_change_the_query_heads_alone():
    groups = [v for v in grids.variants() if v.name.startswith("group ")]
    assert {v.case.shape.group for v in groups} == set(grids.GROUPS)
    assert all(v.case.num_bytes == v.reference.num_bytes for v in groups)


def test_one_shape_and_setting_can_be_measured_alone(tmp_path):
    path = tmp_path / "decode.csv"
    options = ["--grid", "figure5", "--shape", "2 x 8/2 x 2K", "--codes", "B"]
    assert run("decode", *options, "--output", str(path)) == 0
    (row,) = rows(path)
    assert (row["batch"], row["num_kv_heads"], row["num_bits"]) == ("2", "2", "64")
    assert row["command"].endswith("--grid figure5 --shape '2 x 8/2 x 2K' --codes B")


@pytest.mark.parametrize("name", sorted(grids.GRIDS))
def test_every_grid_runs_small(name, tmp_path):
    path = tmp_path / "decode.csv"
    assert run("decode", "--grid", name, "--output", str(path)) == 0
    found = rows(path)
    assert found
    assert {row["command"] for row in found} == {
        f"python -m bench decode --device cpu --quick --grid {name}"
    }


def test_what_two_grids_share_is_measured_once(tmp_path):
    path = tmp_path / "decode.csv"
    assert run("decode", "--grid", "table", "--grid", "figure5", "--output", str(path)) == 0
    cases = [(r["batch"], r["num_heads"], r["seq_len"], r["num_bits"]) for r in rows(path)]
    assert len(cases) == len(set(cases)) == 8


def test_the_crossover_ends_where_every_setting_wins(tmp_path, monkeypatch):
    lengths = (512, 1024, 2048)
    sweep = grids.Sweep(
        tuple(Shape(1, 2, 2, n, dtype=torch.float32) for n in lengths), CONFIGS[:2], True
    )
    plan = grids.Plan((sweep,), (), (), CONFIGS[:2], (), sweep.shapes[0])
    monkeypatch.setattr("bench.__main__.plan_for", lambda *args: plan)
    times = {(512, "A"): 2.0, (512, "B"): 0.5, (1024, "A"): 0.9, (1024, "B"): 0.5}
    monkeypatch.setattr("bench.run.measure_dense", lambda *args: {"sdpa_us": 1.0})
    monkeypatch.setattr(
        decode,
        "step_row",
        lambda run, kv, case: {
            "seq_len": case.shape.seq_len,
            "hata_us": times[case.shape.seq_len, case.config.name],
        },
    )
    path = tmp_path / "decode.csv"
    assert run("decode", "--output", str(path)) == 0
    assert [(row["seq_len"], row["speedup"]) for row in rows(path)] == [
        ("512", "0.5"),
        ("512", "2"),
        ("1024", "1.111"),
        ("1024", "2"),
    ]


def test_rows_are_appended_when_asked_for_and_else_replaced(tmp_path, capsys):
    path = tmp_path / "decode.csv"
    assert run("decode", "--baselines", "none", "--output", str(path)) == 0
    assert {row["sdpa_us"] for row in rows(path)} == {""}
    assert run("decode", "--append", "--output", str(path)) == 0
    assert [bool(row["sdpa_us"]) for row in rows(path)] == [False, False, True, True]
    assert run("decode", "--output", str(path)) == 0
    assert len(rows(path)) == 2
    path.write_text("gpu,us\n")
    assert run("decode", "--append", "--output", str(path)) == 2
    assert "--append must find the columns of this version" in capsys.readouterr().err


def test_a_variant_is_compared_with_what_its_bytes_predict():
    shape = Shape(8, 32, 8, 128 << 10)
    reference_case = Case(shape, CONFIGS[0])
    variant = next(v for v in grids.variants() if v.name == "head_dim 256")
    assert variant.reference == reference_case
    times = {"hata_us": 100.0, "score_select_us": 60.0, "gather_attention_us": 30.0}
    found = variants.ratios(times | {"hata_us": 130.0}, times, variant)
    codes, selected = 64 * (128 << 10) * 18, 64 * 2048 * 512
    assert found["expected_us"] == pytest.approx(100 * (codes + 2 * selected) / (codes + selected))
    assert found["ratio"] == pytest.approx(130 / found["expected_us"])
    assert found["score_select_ratio"] == 1
    assert found["gather_attention_ratio"] == 0.5


def test_one_kind_of_operator_can_be_measured_alone(tmp_path):
    path = tmp_path / "ops.csv"
    assert run("ops", "--op", "select_topk", "--op", "prompt", "--output", str(path)) == 0
    found = rows(path)
    assert {row["op"] for row in found} == {"hash_encode", "cache_append", "select_topk"}
    select = next(row for row in found if row["op"] == "select_topk")
    assert select["baseline"] == "torch.topk"
    assert select["torch_us"] == select["baseline_us"]
    append = next(row for row in found if row["op"] == "cache_append")
    share = 100 * float(append["us"]) / float(append["prefill_us"])
    assert float(append["percent_of_prefill"]) == pytest.approx(share, rel=2e-3)


def test_captured_keys_are_tiled_and_their_codes_are_those_of_the_operator(captured_file):
    captured = Captured.load(captured_file)
    shape = Shape(2, 8, 2, 1000, head_dim=128, dtype=torch.float32)
    timer = timing.Timer(CPU, budget_s=0, cold=False)
    kv = KvPool(shape, timer, 10**9, captured)
    keys = captured.keys.float()
    pair = torch.cat([keys[:, 1], keys[:, 2]], dim=-1)  # KV head 1 is the file's heads 1 and 2
    assert torch.equal(kv.k_caches[0, 1, :, 1], torch.cat([pair, pair, pair, pair[:100]]))
    assert torch.equal(kv.qs[1, 0, 0, 5, :64], captured.queries[2, 3 + 1].float())
    pool = CodePool(kv, Case(shape, CONFIGS[0]), timer)
    codes, norms = reference.hash_encode(kv.k_caches[0, :1], pool.key_weights[0], key_norms=True)
    assert (pool.codes[1, 1] == codes[0]).float().mean() > 0.999
    torch.testing.assert_close(pool.norms[0, :1], norms)
    check_step(pool)


def test_rows_say_which_inputs_they_had(captured_file, tmp_path):
    path = tmp_path / "decode.csv"
    assert run("decode", "--inputs", str(captured_file), "--output", str(path)) == 0
    assert {row["inputs"] for row in rows(path)} == {"captured"}
    assert rows(path)[0]["command"].endswith("--inputs captured.safetensors")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["decode", "--grid", "all"], "--grid must be one of table, figure5, budget, crossover"),
        (["ops", "--op", "attention"], "--op must be one of prompt, encode_query"),
        (["decode", "--codes", "D"], "--codes must be one of A, B, C, got D"),
        (["decode", "--shape", "8 x 8"], "--shape must be one of 1 x 8/2 x 2K, got 8 x 8"),
        (["decode", "--inputs", "missing"], "--inputs must be a file of python -m bench capture"),
        (["decode", "--inputs", __file__], "--inputs must be safetensors"),
        (["decode", "--baselines", "some"], "--baselines"),
    ],
)
def test_bad_options_are_one_line_and_status_2(args, message, capsys):
    assert run(*args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_cpu_measures_no_grid_but_the_table():
    with pytest.raises(ValueError, match="--grid must be table on a CPU, got budget"):
        grids.plan_for(CPU, ["table", "budget"], quick=False)


def test_a_tile_is_repeated_and_cut():
    assert repeat_to(torch.arange(3), 0, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert repeat_to(torch.arange(3), -1, 2).tolist() == [0, 1]


def test_a_rival_that_fails_slowly_is_not_tried_again(monkeypatch):
    tried, notes = [], []
    timer = timing.Timer(CPU, budget_s=0, cold=False)
    shared = Run(None, timer, None, 0, None)
    monkeypatch.setattr(shared, "note", notes.append)

    def fail() -> timing.Timing:
        tried.append(len(tried))
        raise RuntimeError("does not compile\nbecause of this and that")

    assert shared.attempt("FlashInfer", "a shape", fail) is None
    monkeypatch.setattr("bench.run.MAX_FAILURE_S", -1.0)
    assert shared.attempt("FlashInfer", "another", fail) is None
    assert shared.attempt("FlashInfer", "a third", fail) is None
    assert len(tried) == 2
    assert notes[0] == "no FlashInfer for a shape: does not compile"
    assert "any more" in notes[2]
