"""Questions of published long-context datasets, from files that the user has.

Sources: RULER, arXiv 2404.06654, LongBench, arXiv 2308.14508, and LongBench v2, arXiv 2412.15204.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hata.checks import check
from hata.demo.prompt import around_prose
from hata.eval.prose import WHERE
from hata.eval.tasks import LONGBENCH_V2, TASKS, Sample, answer_tokens

_PROMPTS = "dataset2prompt.json"  # LongBench's own file of prompts, by dataset
_SPLITS = ("validation", "test")  # names of RULER's files; their folder is the task
# LongBench asks these without a chat template: few examples or code, to be continued.
_CONTINUED = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")


@dataclass(frozen=True)
class _Question:
    """A question about a text.

    Attributes:
        before: What stands before the text.
        text: The text.
        after: What stands after it.
        prefix: How the answer begins; it may be empty.
        values: The right answers, in the order in which they are given.
        chat: Whether it is asked in the model's chat template.
        whole: Whether no part of the text may be left out.
    """

    before: str
    text: str
    after: str
    prefix: str
    values: tuple[str, ...]
    chat: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Dataset:
    """A file of questions: lines of JSON, or for LongBench v2 one list.

    Attributes:
        task: Its name.
        origin: The name of the folder that the user has named.
        file: The file.
        prompts: LongBench's prompts, by dataset; empty where the folder has no such file.
    """

    task: str
    origin: str
    file: Path
    prompts: dict[str, str]

    def samples(self, tokenizer: Any, num_samples: int, num_tokens: int) -> list[Sample]:
        """Turns the first questions into prompts and right answers.

        A text that is too long loses its middle, as LongBench has it; RULER's must fit.

        Args:
            tokenizer: A transformers tokenizer.
            num_samples: How many, or all where there are fewer.
            num_tokens: The most that prompt and answer may have together.

        Raises:
            ValueError: A line is no question of RULER or LongBench, or one does not fit.
        """
        found = islice(self._questions(), num_samples)
        return [self._sample(tokenizer, question, num_tokens) for question in found]

    def _questions(self) -> Iterator[_Question]:
        try:
            text = self.file.read_text(encoding="utf-8")
            rows = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
            for row in rows:
                yield self._question(row)
        except (ValueError, LookupError, TypeError) as error:
            rule = "hold questions of RULER, LongBench or LongBench v2 as published"
            raise ValueError(
                f"hata.{WHERE}: --dataset must {rule}, got {self.file} ({error!r})"
            ) from error

    def _question(self, row: dict[str, Any]) -> _Question:
        if "outputs" in row:
            values = tuple(map(str, row["outputs"]))
            return _Question("", row["input"], "", row.get("answer_prefix", ""), values, whole=True)
        if "choice_A" in row:
            choices = "".join(f"\n({letter}) {row[f'choice_{letter}']}" for letter in "ABCD")
            after = f"\n\n{row['question']}{choices}\n\nAnswer with the letter of the right choice."
            return _Question("", row["context"], after, "The right choice is", (row["answer"],))
        name = row.get("dataset", self.task).removesuffix("_e")
        frame = self.prompts.get(name, "{context}\n\n{input}\nAnswer:")
        before, after = (
            part.replace("{input}", row["input"]) for part in frame.split("{context}", 1)
        )
        values = (str(row["answers"][0]),)
        return _Question(before, row["context"], after, "", values, chat=name not in _CONTINUED)

    def _sample(self, tokenizer: Any, question: _Question, num_tokens: int) -> Sample:
        if question.chat and getattr(tokenizer, "chat_template", None):
            head, after = around_prose(tokenizer, question.before, question.after)
        else:
            head, after = list(tokenizer(question.before).input_ids), question.after
        tail = list(tokenizer(after, add_special_tokens=False).input_ids)
        decoded, answers = answer_tokens(tokenizer, question.prefix, question.values)
        text = list(tokenizer(question.text, add_special_tokens=False, verbose=False).input_ids)
        room = num_tokens - len(head) - len(tail) - len(decoded)
        need = len(text) if question.whole else 2
        rule = f"be at least {num_tokens - room + need} for {self.task}"
        check(room >= need, WHERE, "--context", rule, num_tokens)
        if len(text) > room:
            text = text[: room // 2] + text[room // 2 - room :]
        prompt = [*head, *text, *tail]
        if not question.prefix:  # then the first value follows the prompt's last token
            decoded = [prompt.pop(), *decoded]
            answers = tuple(range(x.start + 1, x.stop + 1) for x in answers)
        return Sample(prompt, decoded, answers)


def open_datasets(folders: list[Path]) -> list[Dataset]:
    """Finds the files of questions in folders, however deep: ``*.jsonl``, and v2's ``data.json``.

    Raises:
        ValueError: A folder has none, or two files, or a file and a task, have one name.
    """
    found: list[Dataset] = []
    for folder in folders:
        files = sorted([*folder.rglob("*.jsonl"), *folder.rglob("data.json")])
        rule = "name a folder with questions of RULER or LongBench (jsonl)"
        check(len(files) > 0, WHERE, "--dataset", rule, folder)
        prompts: dict[str, str] = {}
        for file in folder.rglob(_PROMPTS):
            prompts |= json.loads(file.read_text(encoding="utf-8"))
        for file in files:
            task = file.parent.name if file.stem in _SPLITS else file.stem
            task = LONGBENCH_V2 if file.name == "data.json" else task
            found.append(Dataset(task, folder.resolve().name, file, prompts))
    names = [*TASKS, *(dataset.task for dataset in found)]
    twice = next((name for name in names if names.count(name) > 1), None)
    check(twice is None, WHERE, "--dataset", "name each task once", twice)
    return found
