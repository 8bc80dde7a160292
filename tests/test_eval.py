"""The command `hata eval` on a tiny model, its tasks and its rows."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import hata.cli
import hata.eval.plots
import hata.eval.run
from hata.eval.prose import Prose
from hata.eval.report import counts, left_out, score
from hata.eval.rows import COLUMNS, compare, summary
from hata.eval.tasks import AT_DEPTHS, TASKS, Sample, task_sample
from tiny_folder import bytewise_tokenizer, save_tiny_llama

DEPTHS = (("0.0", 0.8), ("1.0", 0.4))
NUM_TOKENS = 1400  # bytes: the tokens of the tiny tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bytewise_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        hata.cli.main(["eval", *map(str, args)])
    said = capsys.readouterr()
    return exited.value.code, said.out, said.err


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_has_its_length_and_its_text_the_answers(tokenizer, task):
    prose = Prose.open([])
    sample = task_sample(tokenizer, prose, task, 0.5, NUM_TOKENS, seed=7)
    assert len(sample.prompt_ids) + len(sample.decoded_ids) == NUM_TOKENS
    assert sample == task_sample(tokenizer, prose, task, 0.5, NUM_TOKENS, seed=7)
    assert sample.prompt_ids != task_sample(tokenizer, prose, task, 0.5, NUM_TOKENS, 8).prompt_ids
    text, decoded = tokenizer.decode(sample.prompt_ids), sample.decoded_ids
    for before, answer in zip([None, *sample.answers], sample.answers, strict=False):
        value = tokenizer.decode(decoded[answer.start : answer.stop])
        assert value in text
        assert value.strip()
        if before is not None:
            assert tokenizer.decode(decoded[before.stop : answer.start]).strip() == ","
    assert decoded[sample.answers[-1].stop :] == []


def test_a_needle_stands_at_its_depth(tokenizer):
    found = []
    for depth in (0.0, 0.5, 1.0):
        sample = task_sample(tokenizer, Prose.open([]), AT_DEPTHS, depth, 4000, seed=1)
        found.append(tokenizer.decode(sample.prompt_ids).index("magic numbers for") / 4000)
    assert found[0] < 0.1
    assert 0.4 < found[1] < 0.65
    assert found[2] > 0.85


def test_the_frequent_words_are_the_most_frequent(tokenizer):
    sample = task_sample(tokenizer, Prose.open([]), "frequent_words", 0.0, 4000, seed=2)
    words = tokenizer.decode(sample.prompt_ids).split()
    answers = [tokenizer.decode(sample.decoded_ids[x.start : x.stop]) for x in sample.answers]
    most = sorted(set(words), key=words.count, reverse=True)
    assert most[:3] == answers


def test_windows_are_spread_over_the_users_texts(tokenizer, tmp_path):
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text("".join(f"{letter}{i:03}. " for i in range(200)))
    prose = Prose.open([tmp_path])
    windows = [tokenizer.decode(window) for window in prose.windows(tokenizer, 5, 60)]
    assert [text[:4] for text in windows] == ["a000", "a095", "a190", "b000", "b190"]
    assert {len(text) for text in windows} == {60}
    with pytest.raises(ValueError, match="texts must hold 2000 tokens each, got 1200"):
        prose.windows(tokenizer, 1, 2000)


def test_an_outcome_is_that_of_the_tokens_that_count():
    """Two values of two tokens: sparse gets the first right, dense both."""
    sample = Sample([], [0, 1, 2, 9, 3, 4], (range(1, 3), range(4, 6)))
    dense, sparse = torch.randn(2, 5, 10).log_softmax(2).unbind()
    for logits, wrong in ((dense, []), (sparse, [4])):
        for i, token in enumerate(sample.decoded_ids[1:]):
            logits[i, token] = -5.0 if i in wrong else 5.0
    dense, sparse = dense.log_softmax(1), sparse.log_softmax(1)
    outcome = compare(sample, dense, sparse)
    assert (outcome.score, outcome.dense_score) == (0.5, 1.0)
    some = [0, 1, 3, 4]  # not the comma between them
    tokens = torch.tensor(sample.decoded_ids[1:])
    nll = torch.nn.functional.cross_entropy
    excess = nll(sparse[some], tokens[some]) - nll(dense[some], tokens[some])
    assert outcome.nll_excess == pytest.approx(float(excess), rel=1e-5)
    kl = torch.nn.functional.kl_div(
        sparse[some], dense[some], log_target=True, reduction="batchmean"
    )
    assert outcome.kl == pytest.approx(float(kl), rel=1e-5)
    plain = compare(Sample([], sample.decoded_ids, ()), dense, sparse)
    assert (plain.score, plain.dense_score) == (None, None)
    assert plain.nll_excess == pytest.approx(
        float(nll(sparse, tokens) - nll(dense, tokens)), rel=1e-5
    )


def test_errors_are_paired_and_of_the_samples():
    outcomes = [hata.eval.run.Outcome(s, d, 0.1 * s, 0.2) for s, d in ((1, 1), (0, 1), (1, 0))]
    found = summary(outcomes, dense=False)
    assert found["score"] == pytest.approx(2 / 3)
    assert found["dense_score"] == pytest.approx(2 / 3)
    assert found["stderr"] == pytest.approx(1 / math.sqrt(3))  # of 0, -1, 1
    assert found["kl_stderr"] == pytest.approx(0.0, abs=1e-12)
    assert summary(outcomes, dense=True)["stderr"] == pytest.approx(1 / 3)  # of 1, 0, 1


def test_a_task_counts_where_dense_is_well_above_chance():
    def rows(*scores: float, stderr: float = 0.1) -> list[dict[str, str]]:
        row = {"task": "qa", "context": "99", "method": "dense", "stderr": str(stderr)}
        return [{**row, "score": str(x)} for x in scores]

    assert counts("qa", rows(0.5))
    assert left_out(rows(0.5)) == []
    assert not counts("qa", rows(0.4, stderr=0.01))
    assert not counts("qa", rows(0.5, stderr=0.3))  # two errors reach down to a guess
    assert counts("qa", rows(0.5, 0.5, 0.5, 0.5, stderr=0.3))  # 0.15 for all of them
    said = "qa at 99 tokens, where dense attention scores 0.35 ± 0.07 and a guess 0.17"
    assert left_out(rows(0.4, 0.3)) == [said]
    assert score(rows(0.4, 0.3)) == "0.35 ± 0.07"


def test_a_picture_of_answers_is_of_the_tasks_that_count(tmp_path):
    """qa counts nowhere, and quest has one task alone."""

    def row(method: str, task: str, score: float, top_k: int, depth: str = "") -> dict[str, str]:
        said = {"method": method, "task": task, "score": score, "stderr": 0.03, "top_k": top_k}
        said |= {"depth": depth, "bytes_read": 2 * top_k, "dense_layers": 2, "context": 99}
        return {**dict.fromkeys(COLUMNS, ""), **{k: str(v) for k, v in said.items()}}

    tasks = (("needle_single", 0.9), ("needle_multikey", 0.7), ("qa", 0.2))
    dense = [row("dense", task, score, 0) for task, score in tasks]
    sparse = [row("exact", "needle_multikey", 0.4, 32), row("quest", "needle_single", 0.1, 32)]
    sparse += [row("exact", "needle_single", score, 32, depth) for depth, score in DEPTHS]
    sparse += [row("exact", "qa", 1.0, 32)]
    (panel,) = hata.eval.plots._answers(sparse, dense)
    assert panel.of == "needle_single, needle_multikey"
    assert panel.line == pytest.approx(0.8)
    ((name, (point,)),) = panel.curves.items()
    assert (name, point.bytes_read, point.top_k) == ("exact", 64, 32)
    assert point.value == pytest.approx(0.5)  # of 0.6, over depths, and 0.4
    assert point.error == pytest.approx(0.03 * math.sqrt(1 + 1 / 2) / 2)
    assert hata.eval.plots._answers(sparse, dense[2:]) == []


def test_a_curve_goes_from_budget_to_budget_whatever_order_rows_are_in():
    rows = [dict.fromkeys(COLUMNS, "") | {"top_k": k, "bytes_read": k} for k in ("64", "8", "128")]
    (curve,) = hata.eval.plots._curves(rows, lambda _: (0.0, None)).values()
    assert [point.top_k for point in curve] == [8, 64, 128]


def test_rows_and_a_report_are_written_and_a_run_continues(folder, tmp_path, capsys, monkeypatch):
    written = tmp_path / "not" / "there" / "yet"
    args = ["--model", folder, "--csv", written / "rows.csv"]
    args += ["--context", 900, "--top-k", 0.0355, "--top-k", 912]
    args += ["--num-samples", 2, "--depth", 0.5]
    args += ["--num-decoded", 8, "--device", "cpu", "--method", "exact", "--method", "quest"]
    args += ["--task", "likelihood", "--task", AT_DEPTHS]
    code, out, err = run(capsys, *args, "--report", written / "report")
    assert code == 0, err
    assert "Likelihood of the last 8 of 900 tokens" in out
    rows = rows_of(written / "rows.csv")
    assert tuple(rows[0]) == COLUMNS
    methods = ["dense"] + ["exact"] * 4 + ["quest"] * 2  # exact: softmax and logits
    assert [row["method"] for row in rows] == methods * 2
    for row in rows:
        if row["top_k"] == "32":
            assert float(row["kl"]) > 1e-3
        else:  # everything
            assert float(row["kl"]) == pytest.approx(0.0, abs=1e-4)
    few = next(row for row in rows if row["method"] == "quest")
    assert float(few["bytes_per_token"]) == 4 * 64 / 16
    assert float(few["bytes_read"]) == pytest.approx(16 + 32 / 900 * 256, rel=1e-4)
    report = (written / "report" / "report.md").read_text()
    assert f"Left out: {AT_DEPTHS} at 900 tokens" in report  # a random model finds nothing
    for picture in re.findall(r"\]\((.*\.png)\)", report):
        assert (written / "report" / picture).read_bytes().startswith(b"\x89PNG")

    # The same again measures nothing; a new task is added, and what stood there stays.
    measured = []
    measure = hata.eval.run._measure
    monkeypatch.setattr(hata.eval.run, "_measure", lambda *x: measured.append(x[2]) or measure(*x))
    assert run(capsys, *args)[0] == 0
    assert measured == []
    assert run(capsys, *args, "--task", "common_words")[0] == 0
    assert len(measured) == 1
    assert rows_of(written / "rows.csv")[: len(rows)] == rows
    assert len(rows_of(written / "rows.csv")) == len(rows) + len(methods)

    # Numbers of dense layers stand side by side.
    assert "by leading dense layers" not in out
    both = ["--task", "likelihood", "--num-dense-layers", 2, "--num-dense-layers", 3]
    code, out, _ = run(capsys, *args[:-4], *both)
    assert code == 0
    assert "KL by leading dense layers, last 8 of 900 tokens" in out
    assert re.search(r"quest.* 32 +\d\.\d+ ± \d\.\d+ +\d\.\d+ ± ", out)


def test_rows_of_shared_selections(folder, tmp_path, capsys):
    """Of three sparse layers two select, or one: as many bytes are read to choose."""
    args = ["--model", folder, "--csv", tmp_path / "rows.csv", "--device", "cpu"]
    args += ["--context", 400, "--num-decoded", 8, "--num-samples", 1, "--task", "likelihood"]
    args += ["--method", "hata", "--random-bits", 64, "--no-key-norms", "--top-k", 32]
    args += ["--num-dense-layers", 1, "--share-layers", 2, "--share-layers", "1,2"]
    code, out, err = run(capsys, *args, "--share-layers", 3)
    assert code == 0, err
    assert "2 layers share" in out
    assert "layers 1,2 select" in out
    found = {
        row["share_layers"]: float(row["bytes_per_token"])
        for row in rows_of(tmp_path / "rows.csv")[1:]
    }
    assert found == pytest.approx({"2": 8 * 2 / 3, "1,2": 8 * 2 / 3, "3": 8 / 3}, rel=1e-3)


def test_rows_of_larger_budgets_in_the_first_layers_and_of_completions(folder, tmp_path, capsys):
    """A larger budget is of sparse layers alone, a completion of codes alone."""
    args = ["--model", folder, "--csv", tmp_path / "rows.csv", "--device", "cpu"]
    args += ["--context", 400, "--num-decoded", 8, "--num-samples", 1, "--task", "likelihood"]
    args += ["--method", "hata", "--method", "quest", "--random-bits", 64, "--no-key-norms"]
    args += ["--top-k", 32, "--leading-top-k", 96, "--num-dense-layers", 0]
    args += ["--num-dense-layers", 2, "--completion", "known", "--report", tmp_path / "report"]
    code, out, err = run(capsys, *args)
    assert code == 0, err
    rows = rows_of(tmp_path / "rows.csv")[1:]
    seen = {(x["method"], x["dense_layers"], x["leading_top_k"], x["completion"]) for x in rows}
    larger = {("hata", "0", n, c) for n in ("", "96") for c in ("", "known")}
    larger |= {("quest", "0", n, "") for n in ("", "96")}
    assert seen == larger | {("hata", "2", "", c) for c in ("", "known")} | {("quest", "2", "", "")}
    layers = 4
    for row in rows:
        mean = 32 + (2 * (96 - 32) / layers if row["leading_top_k"] else 0)
        read = float(row["bytes_read"]) - float(row["bytes_per_token"])
        assert read == pytest.approx(mean / 400 * 256, rel=1e-3)
    assert "query 4, 96 in the first layers, completed: known" in out


def budget_file(path: Path, *levels: tuple[int, list[int]], num_bits: int = 64) -> Path:
    """As `hata recall --frontier` writes it: what one top_k is shared out as, for each of them."""
    found = [
        {
            "uniform": {"num_bits": 64, "top_k": top_k},
            "per_layer": {"num_bits": [num_bits] * len(own), "top_k": own},
        }
        for top_k, own in levels
    ]
    path.write_text(json.dumps({"num_dense_layers": 1, "levels": found}))
    return path


def test_rows_of_budgets_from_a_file(folder, tmp_path, capsys):
    """Equal ones give the row of the one number; bytes are those of the sparse layers' mean."""
    args = ["--model", folder, "--csv", tmp_path / "rows.csv", "--device", "cpu"]
    args += ["--context", 400, "--num-decoded", 8, "--num-samples", 1, "--task", "likelihood"]
    args += ["--method", "exact", "--top-k", 32, "--top-k", 64, "--num-dense-layers", 1]
    assert run(capsys, *args)[0] == 0
    older = tmp_path / "rows.csv"  # without the column, as the rows of earlier versions
    older.write_text(older.read_text().replace(",layer_budgets,", ",").replace(",,,4,16", ",,4,16"))
    own = budget_file(tmp_path / "own.json", (32, [32] * 4), (64, [999, 128, 32, 32]))
    code, out, err = run(capsys, *args, "--num-dense-layers", 2, "--layer-budgets", own)
    assert code == 0, err
    assert "layers as in own.json" in out
    rows = [row for row in rows_of(tmp_path / "rows.csv") if row["recipe"] == "softmax"]
    assert [row["layer_budgets"] for row in rows if row["dense_layers"] == "2"] == ["", ""]
    alike, more, own, more_own = (row for row in rows if row["dense_layers"] == "1")
    assert own == {**alike, "layer_budgets": "own.json"}
    assert (more_own["top_k"], more_own["layer_budgets"]) == ("64", "own.json")
    assert more_own["bytes_read"] == more["bytes_read"]
    assert more_own["kl"] != more["kl"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--task cooking", "--task must be one of likelihood, .* got cooking"),
        ("--depth 2", "--depth must be in 0..1, got 2.0"),
        ("--context 8", "--context must be at least 32, got 8"),
        ("--top-k 10", "--top-k must be at least num_sink \\+ num_recent=20, got 10"),
        ("--num-samples 0", "--num-samples must be at least 1, got 0"),
        ("--num-decoded 2", "--num-decoded must be in 3..1024, got 2"),
        ("--completion half", "--completion must be one of estimate, cap, .* got half"),
        ("--leading-top-k 8", "--top-k must be at least num_sink .* got 8"),
        ("--share-layers 0", "--share-layers must be a number of layers from 1 on, .* got 0"),
        (
            "--share-layers 4,2",
            r"share_selection must name each layer once, in ascending order, got \(4, 2\)",
        ),
        ("--context 512 --model MODEL --num-dense-layers 4", "--num-dense-layers must leave one"),
        (
            "--context 512 --model MODEL --random-bits 64 --random-bits 64",
            "--weights and --random-bits must differ in what a row says",
        ),
        ("--query-bits 9", "--query-bits must be in 1..4, got 9"),
        ("no/such", "texts must name existing files or folders, got no/such"),
        ("--context 2048 --model MODEL", "--context must be at most .* got 2048"),
        ("--context 512 --model MODEL --method dense", "--method must be one of exact, .* dense"),
        ("--context 512 --model MODEL --csv OTHER", "--csv must be a file of hata eval, .* x,y"),
        (
            "--layer-budgets OTHER",
            "--layer-budgets must be of hata recall --frontier or of --cho",
        ),
        ("--choose-on TEXT", "--layer-budgets must be given once with --choose-on, got none"),
        (
            "--choose-on TEXT --layer-budgets NEW --context 512 --context 600",
            "--context must be given once with --choose-on, got 512, 600",
        ),
        (
            "--choose-on TEXT --layer-budgets NEW --context 512 --model MODEL --top-k 256",
            "--top-k must be at most half of the prompt, 192, with --choose-on, got 256",
        ),
        (
            "--choose-on TEXT --layer-budgets NEW --context 512 --model MODEL --method exact",
            "--weights must name hash weights, or the package .* with --choose-on, got none",
        ),
        ("--layer-budgets BITS", r"--layer-budgets must name files of one .* with \[32, 64\]"),
        ("--layer-budgets OWN", r"--num-dense-layers must include 1, as .*own.json .* got \[2\]"),
        (
            "--context 512 --model MODEL --layer-budgets OWN --num-dense-layers 1 --top-k 48",
            "--top-k must be one of 32 with --layer-budgets own.json, got 48",
        ),
        (
            "--context 512 --model MODEL --layer-budgets OWN --num-dense-layers 1 --top-k 32",
            "top_k must be one number or have num_layers=4 entries, got 3 entries",
        ),
        (
            "--context 512 --model MODEL --task needle_multikey",
            "--context must be at least .* for needle_multikey, got 512",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, args, message):
    (tmp_path / "other.csv").write_text("x,y\n1,2\n")
    places = {"MODEL": folder, "OTHER": tmp_path / "other.csv"}
    places |= {"TEXT": Path(__file__), "NEW": tmp_path / "new.json"}
    places["OWN"] = budget_file(tmp_path / "own.json", (32, [32] * 3))
    places["BITS"] = budget_file(tmp_path / "bits.json", (32, [32] * 4), num_bits=32)
    words = [places.get(word, word) for word in args.split()]
    if "--csv" not in args:
        words += ["--csv", tmp_path / "rows.csv"]
    code, _, err = run(capsys, *words, "--device", "cpu")
    assert code == 2
    assert re.fullmatch(f"error: .*{message}.*\n", err.splitlines(keepends=True)[-1]), err
