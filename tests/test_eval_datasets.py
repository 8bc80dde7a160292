"""Questions of RULER and LongBench from files: prompts, right answers, what does not fit."""

import csv
import json
from pathlib import Path

import pytest

import hata.cli
from hata.eval.datasets import open_datasets
from hata.eval.report import counts
from tiny_folder import bytewise_tokenizer, save_tiny_llama

STORY = "".join(f"On day {i} it rained. " for i in range(40))
RULER = {
    "index": 0,
    "input": f"Memorize it. {STORY}What are the numbers?",
    "outputs": ["12", "345"],
    "length": 900,
    "answer_prefix": " They are",
}
LONGBENCH = {
    "input": "Which day?",
    "context": STORY,
    "answers": ["The third", "3rd"],
    "length": 200,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "x",
}
CHOICES = {f"choice_{letter}": f"day {letter}" for letter in "ABCD"}
LONGBENCH_V2 = {"_id": "y", "question": "Which?", **CHOICES, "answer": "C", "context": STORY}
PROMPTS = {"qasper": "Read this: {context}\n\nNow answer: {input} Answer:"}
TOKENIZER = bytewise_tokenizer()
TEMPLATE = "{{ '<' + messages[0]['content'] + '>' }}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as RULER and LongBench write theirs."""
    folder = tmp_path / "published"
    (folder / "niah_multivalue").mkdir(parents=True)
    (folder / "niah_multivalue" / "validation.jsonl").write_text(json.dumps(RULER) + "\n")
    (folder / "qasper_e.jsonl").write_text(f"{json.dumps(LONGBENCH)}\n" * 3)
    other = {**LONGBENCH, "dataset": "trec"}
    (folder / "trec.jsonl").write_text(json.dumps(other) + "\n")
    (folder / "v2").mkdir()
    (folder / "v2" / "data.json").write_text(json.dumps([LONGBENCH_V2]))
    (folder / "dataset2prompt.json").write_text(json.dumps(PROMPTS))
    return folder


def asked(folder: Path, num_tokens: int) -> dict[str, tuple[str, str, list[str]]]:
    """Prompt, what is decoded and the values of the first question of each task."""
    found = {}
    for dataset in open_datasets([folder]):
        sample = dataset.samples(TOKENIZER, 2, num_tokens)[0]
        ids = sample.decoded_ids
        values = [TOKENIZER.decode(ids[x.start : x.stop]) for x in sample.answers]
        found[dataset.task] = TOKENIZER.decode(sample.prompt_ids), TOKENIZER.decode(ids), values
    return found


def test_each_format_becomes_a_prompt_and_its_answer(folder, monkeypatch):
    found = asked(folder, 2000)
    assert found["niah_multivalue"] == (RULER["input"], " They are 12, 345", ["12", "345"])
    prompt = f"Read this: {STORY}\n\nNow answer: Which day? Answer"
    assert found["qasper_e"] == (prompt, ": The third", ["The third"])
    prompt, decoded, values = found["longbench_v2"]
    assert prompt.startswith(f"{STORY}\n\nWhich?\n(A) day A\n(B) day B")
    assert (decoded, values) == ("The right choice is C", ["C"])

    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE)
    found = asked(folder, 2000)
    assert found["niah_multivalue"][0] == f"<{RULER['input']}>"
    assert found["trec"][0] == f"{STORY}\n\nWhich day?\nAnswer"  # is continued, not asked


def test_a_text_that_is_too_long_loses_its_middle_but_rulers_must_fit(folder):
    (folder / "niah_multivalue" / "validation.jsonl").unlink()
    prompt, decoded, _ = asked(folder, 300)["qasper_e"]
    assert len(prompt) + len(decoded) == 300
    kept = prompt.removeprefix("Read this: ").removesuffix("\n\nNow answer: Which day? Answer")
    assert kept == STORY[: len(kept) // 2] + STORY[len(kept) // 2 - len(kept) :]
    (folder / "niah_multivalue" / "validation.jsonl").write_text(json.dumps(RULER) + "\n")
    with pytest.raises(ValueError, match="--context must be at least 881 for niah_multivalue"):
        asked(folder, 300)


def test_a_run_answers_them_and_says_where_they_are_from(folder, tmp_path, monkeypatch):
    model = save_tiny_llama(tmp_path / "model")
    args = ["eval", "--model", str(model), "--csv", str(tmp_path / "rows.csv"), "--device", "cpu"]
    args += ["--context", "1000", "--top-k", "32", "--num-samples", "2", "--task", "likelihood"]
    args += ["--method", "streaming", "--dataset", str(folder), "--num-decoded", "4"]
    with pytest.raises(SystemExit) as exited:
        hata.cli.main(args)
    assert exited.value.code == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tasks = ["likelihood", "niah_multivalue", "qasper_e", "trec", "longbench_v2"]
    assert [row["task"] for row in rows[::2]] == tasks
    assert {row["texts"] for row in rows[2:]} == {"published"}
    dense = [{"task": "longbench_v2", "score": "0.5", "stderr": "0.01"}]
    assert not counts("longbench_v2", dense)  # a guess among four choices scores 0.25
    assert counts("qasper_e", [{**dense[0], "task": "qasper_e"}])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "", "--dataset must name a folder with questions of RULER or LongBench"),
        ("x.jsonl", '{"a": 1}\n', "--dataset must hold questions of RULER, LongBench .*x.jsonl"),
        ("x.jsonl", "no json\n", "--dataset must hold questions of RULER, LongBench .*x.jsonl"),
        ("qa.jsonl", "", "--dataset must name each task once, got qa"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        asked(tmp_path, 500)
