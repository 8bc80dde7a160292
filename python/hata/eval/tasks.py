"""RULER-style tasks over real prose, and plain text: prompts with known answers.

Source: RULER, arXiv 2404.06654, sections 3 and B. What differs is said in docs/eval.md.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hata.checks import check
from hata.demo.prompt import (
    ANSWER_PREFIX,
    INSTRUCTION,
    KEYS,
    NEEDLE,
    QUESTION,
    around_prose,
    plant,
)
from hata.eval.prose import WHERE, Prose

LIKELIHOOD = "likelihood"
LONGBENCH_V2 = "longbench_v2"  # a task of `hata.eval.datasets`
AT_DEPTHS = "needle_single"  # the task that stands once for each depth
_NUM_NEEDLES = 4
_NUM_KEYS = 12
_WORDS_A_BLOCK, _NUM_OTHER_WORDS = 20, 100
_NAMES = ("Alma Berg", "Boris Lind", "Clara Voss", "Dario Funk", "Edith Moss", "Felix Hart")
_CITIES = ("Lisbon", "Vienna", "Madrid", "Athens", "Dublin", "Prague", "Berlin", "Moscow")

Facts = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Problem:
    """A question about a text.

    Attributes:
        instruction: What stands before the text.
        facts: Depth and sentence of each fact to hide, in order of depth.
        question: What stands after it.
        prefix: How the answer begins.
        values: The right answers, in the order in which they are asked for.
        words: What the text is made of; None is prose.
    """

    instruction: str
    facts: Facts
    question: str
    prefix: str
    values: tuple[str, ...]
    words: Iterator[str] | None = None


@dataclass(frozen=True)
class Sample:
    """A dense prompt, and what is decoded sparsely after it.

    Attributes:
        prompt_ids: Tokens of the prompt, the question included.
        decoded_ids: Tokens of the right answer, or of the text.
        answers: Which of them are the values that count; none in plain text.
    """

    prompt_ids: list[int]
    decoded_ids: list[int]
    answers: tuple[range, ...]


def likelihood_samples(
    tokenizer: Any, prose: Prose, num_samples: int, num_tokens: int, num_decoded: int
) -> list[Sample]:
    """Cuts windows of text, whose last ``num_decoded`` tokens are decoded.

    Raises:
        ValueError: A text is too short.
    """
    windows = prose.windows(tokenizer, num_samples, num_tokens)
    return [Sample(x[:-num_decoded], x[-num_decoded:], ()) for x in windows]


def task_sample(
    tokenizer: Any, prose: Prose, task: str, depth: float, num_tokens: int, seed: object
) -> Sample:
    """Makes a problem of a task, prompt and answer together exactly ``num_tokens`` long.

    Args:
        tokenizer: A transformers tokenizer.
        prose: The text that it is about.
        task: One of `TASKS`.
        depth: Where the fact of `AT_DEPTHS` stands, 0 (first) to 1 (last); other tasks draw it.
        num_tokens: Of the whole.
        seed: Chooses text, facts and depths.

    Raises:
        ValueError: ``num_tokens`` is too few.
    """
    chosen = random.Random(str(seed))
    problem = TASKS[task].make(chosen, prose, depth)

    def tokens_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    head, after = around_prose(tokenizer, problem.instruction, problem.question)
    tail = tokens_of(after)
    decoded, answers = answer_tokens(tokenizer, problem.prefix, problem.values)
    facts = [(where, tokens_of(sentence)) for where, sentence in problem.facts]
    room = num_tokens - len(head) - len(tail) - len(decoded)
    need = sum(len(fact) for _, fact in facts)
    rule = f"be at least {num_tokens - room + need + 1} for {task}"
    check(room > need, WHERE, "--context", rule, num_tokens)
    if problem.words is None:
        sentences = prose.sentences(tokenizer, chosen)
    else:
        sentences = (tokens_of(f"{word} ") for word in problem.words)
    text, _ = plant(sentences, facts, room)
    return Sample([*head, *text, *tail], decoded, answers)


def answer_tokens(
    tokenizer: Any, prefix: str, values: Sequence[str]
) -> tuple[list[int], tuple[range, ...]]:
    """Writes an answer: its beginning, and the values with commas between them.

    Args:
        tokenizer: A transformers tokenizer.
        prefix: How the answer begins.
        values: What it consists of.

    Returns:
        The tokens, and which of them are each value's.
    """

    def tokens_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    decoded, answers = tokens_of(prefix), []
    for i, value in enumerate(values):
        decoded += tokens_of(",") if i else []
        token_ids = tokens_of(f" {value}")
        blank = not tokenizer.decode(token_ids[0]).strip()  # a space alone is none of the value
        answers.append(range(len(decoded) + blank, len(decoded) + len(token_ids)))
        decoded += token_ids
    return decoded, tuple(answers)


def _hidden(chosen: random.Random, sentences: list[str]) -> Facts:
    """Gives sentences random depths, in their order."""
    return tuple(zip(sorted(chosen.random() for _ in sentences), sentences, strict=True))


def _number(chosen: random.Random) -> str:
    return str(chosen.randint(1_000_000, 9_999_999))


def _keys(chosen: random.Random, count: int) -> list[str]:
    first, second = zip(*(key.split("-") for key in KEYS), strict=True)
    return chosen.sample([f"{a}-{b}" for a, b in itertools.product(first, second)], count)


def _needle_single(chosen: random.Random, prose: Prose, depth: float) -> Problem:
    (key,), number = _keys(chosen, 1), _number(chosen)
    facts = ((depth, NEEDLE.format(key=key, number=number)),)
    return _needles(key, facts, (number,))


def _needle_multikey(chosen: random.Random, prose: Prose, depth: float) -> Problem:
    numbers = {key: _number(chosen) for key in _keys(chosen, _NUM_KEYS)}
    sentences = [NEEDLE.format(key=key, number=number) for key, number in numbers.items()]
    key = chosen.choice(list(numbers))
    return _needles(key, _hidden(chosen, sentences), (numbers[key],))


def _needles(key: str, facts: Facts, values: tuple[str, ...]) -> Problem:
    question, prefix = QUESTION.format(key=key), ANSWER_PREFIX.format(key=key)
    return Problem(INSTRUCTION, facts, question, prefix, values)


_MANY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
_ASK_MANY = (
    "\nWhat are all the special magic numbers for {} mentioned in the provided text, in the order "
    "of {}?"
)
_MANY_ARE = "The special magic numbers for {} mentioned in the provided text are"


def _needle_multivalue(chosen: random.Random, prose: Prose, depth: float) -> Problem:
    (key,) = _keys(chosen, 1)
    values = tuple(_number(chosen) for _ in range(_NUM_NEEDLES))
    facts = _hidden(chosen, [NEEDLE.format(key=key, number=number) for number in values])
    ask = _ASK_MANY.format(key, "the text")
    return Problem(_MANY, facts, ask, _MANY_ARE.format(key), values)


def _needle_multiquery(chosen: random.Random, prose: Prose, depth: float) -> Problem:
    numbers = {key: _number(chosen) for key in _keys(chosen, _NUM_NEEDLES)}
    facts = _hidden(chosen, [NEEDLE.format(key=k, number=n) for k, n in numbers.items()])
    asked = chosen.sample(list(numbers), _NUM_NEEDLES)
    names = ", ".join(asked[:-1]) + f" and {asked[-1]}"
    values = tuple(numbers[key] for key in asked)
    return Problem(
        _MANY, facts, _ASK_MANY.format(names, "this question"), _MANY_ARE.format(names), values
    )


def _variable_tracking(chosen: random.Random, prose: Prose, depth: float) -> Problem:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = ["".join(chosen.choices(letters, k=5)) for _ in range(2 * _NUM_NEEDLES)]
    value, other = (str(chosen.randint(10_000, 99_999)) for _ in range(2))
    chains: list[tuple[float, str]] = []
    for chain, start in ((names[:_NUM_NEEDLES], value), (names[_NUM_NEEDLES:], other)):
        sources = [start, *(f"VAR {name}" for name in chain)]
        assigned = [f"VAR {x} = {source}. " for x, source in zip(chain, sources, strict=False)]
        chains += _hidden(chosen, assigned)
    asked = f"\nFind all variables that are assigned the value {value} in the text above."
    prefix = (
        "According to the chain of variable assignment in the text above, "
        f"{_NUM_NEEDLES} variables are assigned the value {value}, they are:"
    )
    instruction = (
        "Memorize and track the chains of variable assignment hidden in the following text.\n"
    )
    return Problem(instruction, tuple(sorted(chains)), asked, prefix, tuple(names[:_NUM_NEEDLES]))


def _word_list(chosen: random.Random, prose: Prose, counts: tuple[int, ...], asked: str) -> Problem:
    """A list of words, of which some stand a given number of times in every block."""
    need = len(counts) + _NUM_OTHER_WORDS
    rule = f"hold {need} different words of 4 to 8 letters for lists of words"
    check(len(prose.words) >= need, WHERE, "texts", rule, len(prose.words))
    words = chosen.sample(prose.words, need)
    frequent, others = words[: len(counts)], words[len(counts) :]

    def blocks() -> Iterator[str]:
        while True:
            repeated = [x for x, n in zip(frequent, counts, strict=True) for _ in range(n)]
            block = repeated + chosen.sample(others, _WORDS_A_BLOCK - len(repeated))
            yield from chosen.sample(block, len(block))

    instruction = "Below is a list of words, some of which appear more often than others.\n"
    question = f"\nWhat {asked} in the list above?"
    verb, subject = asked.split(" ", 1)
    prefix = f"{subject.capitalize()} in the list above {verb}"
    return Problem(instruction, (), question, prefix, tuple(frequent), blocks())


def _common_words(chosen: random.Random, prose: Prose, depth: float) -> Problem:
    return _word_list(chosen, prose, (4,), "is the most common word")


def _frequent_words(chosen: random.Random, prose: Prose, depth: float) -> Problem:
    return _word_list(chosen, prose, (6, 4, 2), "are the three most frequent words, by frequency,")


def _qa(chosen: random.Random, prose: Prose, depth: float) -> Problem:
    cities = dict(zip(_NAMES, chosen.sample(_CITIES, len(_NAMES)), strict=True))
    people = chosen.sample(_NAMES, len(_NAMES))
    moved = [f"In {1900 + i}, {x} moved to the city of {cities[x]}. " for i, x in enumerate(people)]
    asked = chosen.choice(_NAMES)
    instruction = "Read the following text. I will ask you a question about it afterwards.\n"
    question = f"\nAccording to the text, which city did {asked} move to?"
    prefix = f"According to the text, {asked} moved to the city of"
    return Problem(instruction, _hidden(chosen, moved), question, prefix, (cities[asked],))


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    Attributes:
        make: Makes a problem from random numbers, prose and a depth.
        chance: The score of a guess among what the text offers: one of 12 numbers, for example.
    """

    make: Callable[[random.Random, Prose, float], Problem]
    chance: float


TASKS = {
    AT_DEPTHS: Task(_needle_single, 0.0),
    "needle_multikey": Task(_needle_multikey, 1 / _NUM_KEYS),
    "needle_multivalue": Task(_needle_multivalue, 1 / _NUM_NEEDLES),
    "needle_multiquery": Task(_needle_multiquery, 1 / _NUM_NEEDLES),
    "variable_tracking": Task(_variable_tracking, 1 / (2 * _NUM_NEEDLES)),
    "common_words": Task(_common_words, 4 / _WORDS_A_BLOCK),
    "frequent_words": Task(_frequent_words, 6 / _WORDS_A_BLOCK),
    "qa": Task(_qa, 1 / len(_NAMES)),
}


def chance(task: str) -> float:
    """The score of a guess; 0 for a dataset's tasks but those with four choices."""
    if task in TASKS:
        return TASKS[task].chance
    return 0.25 if task == LONGBENCH_V2 else 0.0
