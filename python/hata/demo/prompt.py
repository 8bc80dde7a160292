"""The prompt: real prose with one planted fact, and a question about it at the end."""

import itertools
import pydoc_data.topics
import random
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hata.checks import check

# RULER's needle in a haystack (arXiv 2404.06654), single number, with its answer prefix.
INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {key} is: {number}. "
QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text?"
ANSWER_PREFIX = "The special magic number for {key} mentioned in the provided text is"

KEYS = (
    "amber-harbor", "brave-lantern", "calm-orchard", "distant-violin", "eager-compass",
    "gentle-glacier", "hidden-meadow", "lively-anchor", "patient-falcon", "quiet-bakery",
)  # fmt: skip
PROSE_MARK = "<|hata prose|>"  # where the prose stands while the chat template is applied


@dataclass(frozen=True)
class Prompt:
    """A prompt and what is known about it.

    Attributes:
        token_ids: The tokens of the prompt.
        key: What the number is for.
        number: The planted number, the right answer.
        position: The token at which the planted sentence begins.
        answer_prefix: The beginning of the answer, which the prompt ends with.
    """

    token_ids: list[int]
    key: str
    number: str
    position: int
    answer_prefix: str


def prose() -> list[str]:
    """Returns the sentences of Python's documentation topics, which every Python carries."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return sentences_of("\n".join(topics[name] for name in sorted(topics)))


def sentences_of(text: str) -> list[str]:
    """Cuts a text behind each sentence and the space after it."""
    return re.findall(r".+?(?:[.:!?]\s+|\Z)", text, flags=re.DOTALL)


def build_prompt(tokenizer: Any, num_tokens: int, depth: float, seed: int) -> Prompt:
    """Builds a prompt of exactly ``num_tokens`` tokens.

    The fact stands after the first sentence that reaches ``depth`` of the prose. Prose that is too
    short for the prompt is repeated. The chat template is used where the tokenizer has one.

    Args:
        tokenizer: A transformers tokenizer.
        num_tokens: Length of the prompt.
        depth: Where in the prose the fact stands, 0 (first) to 1 (last).
        seed: Chooses the key and the number.

    Returns:
        The prompt.

    Raises:
        ValueError: ``num_tokens`` is too few for instruction, fact and question.
    """
    chosen = random.Random(seed)
    key = chosen.choice(KEYS)
    number = str(chosen.randint(1_000_000, 9_999_999))
    answer_prefix = ANSWER_PREFIX.format(key=key)
    head, after = around_prose(tokenizer, INSTRUCTION, QUESTION.format(key=key))
    tail: list[int] = tokenizer(after + answer_prefix, add_special_tokens=False).input_ids
    fact: list[int] = tokenizer(
        NEEDLE.format(key=key, number=number), add_special_tokens=False
    ).input_ids

    room = num_tokens - len(head) - len(fact) - len(tail)
    rule = f"leave room for prose beside the question, fact and answer: {-room + 1} more tokens"
    check(room > 0, "demo", "--context", rule, num_tokens)
    sentences: list[list[int]] = tokenizer(prose(), add_special_tokens=False).input_ids
    text, (position,) = plant(itertools.cycle(sentences), [(depth, fact)], room + len(fact))
    return Prompt([*head, *text, *tail], key, number, len(head) + position, answer_prefix)


def around_prose(tokenizer: Any, instruction: str, question: str) -> tuple[list[int], str]:
    """Returns what stands around the prose of a prompt: the tokens before and the text after it.

    The chat template is used where the tokenizer has one, and then writes what a text begins with.
    """
    frame = instruction + PROSE_MARK + question
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if has_template:
        message = [{"role": "user", "content": frame}]
        frame = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    else:
        frame += "\n"
    before, after = frame.split(PROSE_MARK)
    head: list[int] = tokenizer(before, add_special_tokens=not has_template).input_ids
    return head, after


def plant(
    sentences: Iterable[list[int]], facts: Sequence[tuple[float, list[int]]], num_tokens: int
) -> tuple[list[int], list[int]]:
    """Puts facts between sentences, each after the first one that reaches its depth.

    Args:
        sentences: Tokens of each; enough for ``num_tokens``. The last one is cut.
        facts: Depth, 0 (before all prose) to 1 (behind it), and tokens of each, in order of depth.
        num_tokens: Of prose and facts together.

    Returns:
        The tokens, and the position at which each fact begins.
    """
    room = num_tokens - sum(len(fact) for _, fact in facts)
    prose: list[int] = []
    ends = [0]
    for sentence in sentences:
        prose += sentence
        ends.append(len(prose))
        if len(prose) >= room:
            break
    text: list[int] = []
    positions: list[int] = []
    done = 0
    for depth, fact in facts:
        split = min(ends[bisect_left(ends, depth * room)], room)
        text += prose[done:split]
        positions.append(len(text))
        text += fact
        done = split
    return text + prose[done:room], positions
