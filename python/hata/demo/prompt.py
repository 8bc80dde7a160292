"""The prompt: real prose with one planted fact, and a question about it at the end."""

import pydoc_data.topics
import random
import re
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
    text = "\n".join(topics[name] for name in sorted(topics))
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
    frame = INSTRUCTION + PROSE_MARK + QUESTION.format(key=key)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if has_template:
        message = [{"role": "user", "content": frame}]
        frame = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    else:
        frame += "\n"
    before, after = frame.split(PROSE_MARK)
    head: list[int] = tokenizer(before, add_special_tokens=not has_template).input_ids
    tail: list[int] = tokenizer(after + answer_prefix, add_special_tokens=False).input_ids
    fact: list[int] = tokenizer(
        NEEDLE.format(key=key, number=number), add_special_tokens=False
    ).input_ids

    room = num_tokens - len(head) - len(fact) - len(tail)
    rule = f"leave room for prose beside the question, fact and answer: {-room + 1} more tokens"
    check(room > 0, "demo", "--context", rule, num_tokens)
    sentences: list[list[int]] = tokenizer(prose(), add_special_tokens=False).input_ids
    text: list[int] = []
    split = 0
    while len(text) < room:
        for sentence in sentences:
            if len(text) < depth * room:
                split = len(text) + len(sentence)
            text += sentence
            if len(text) >= room:
                break
    split = min(split, room)
    token_ids = [*head, *text[:split], *fact, *text[split:room], *tail]
    return Prompt(token_ids, key, number, len(head) + split, answer_prefix)
