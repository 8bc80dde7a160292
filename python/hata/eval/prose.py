"""Real prose: the text that tasks hide their facts in, and that likelihood is measured on."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hata.checks import check
from hata.demo.prompt import prose, sentences_of
from hata.training.texts import text_files

WHERE = "eval"
_PYTHON = "Python's documentation (pydoc_data.topics)"
_CHARACTERS_PER_TOKEN = 16  # more than tokenizers reach on prose and code


@dataclass(frozen=True)
class Prose:
    """Some texts.

    Attributes:
        name: What they are, for tables.
        texts: Each text, cut into sentences.
    """

    name: str
    texts: list[list[str]] = field(repr=False)

    @classmethod
    def open(cls, paths: list[Path]) -> "Prose":
        """Reads files and folders of UTF-8 text; without any it is Python's documentation.

        Raises:
            ValueError: One does not exist or is no UTF-8 text.
        """
        if not paths:
            return cls(_PYTHON, [prose()])
        texts = []
        for file in text_files(paths):
            try:
                texts.append(sentences_of(file.read_text(encoding="utf-8")))
            except UnicodeDecodeError as error:
                raise ValueError(f"hata.{WHERE}: {file} must be UTF-8 text, got {error}") from error
        return cls(", ".join(path.name for path in paths), texts)

    def sentences(self, tokenizer: Any, chosen: random.Random) -> Iterator[list[int]]:
        """Yields the tokens of sentences without end, from a random one on."""
        text = chosen.choice(self.texts)
        start = chosen.randrange(len(text))
        while True:
            for sentence in text[start:]:
                yield tokenizer(sentence, add_special_tokens=False).input_ids
            start = 0

    def window(self, tokenizer: Any, number: int, num_tokens: int, seed: int) -> list[int]:
        """Cuts a window of a text, from a random sentence on.

        Args:
            tokenizer: A transformers tokenizer.
            number: Of the window; the texts take turns.
            num_tokens: Of the window, with what the tokenizer begins a text with.
            seed: Chooses the sentence, together with the number.

        Raises:
            ValueError: The text is too short.
        """
        text = self.texts[number % len(self.texts)]
        length = _CHARACTERS_PER_TOKEN * num_tokens
        starts = [0]  # sentences with enough text behind them
        behind = sum(map(len, text))
        for i, sentence in enumerate(text):
            if behind < length:
                break
            starts.append(i)
            behind -= len(sentence)
        start = random.Random(f"{seed} {number}").choice(starts)
        piece = "".join(text[start:])[:length]
        begin: list[int] = list(tokenizer("").input_ids)[:1]
        tokens = begin + tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        rule = f"hold {num_tokens} tokens each"
        check(len(tokens) >= num_tokens, WHERE, "texts", rule, len(tokens))
        return tokens[:num_tokens]

    @cached_property
    def words(self) -> list[str]:
        """The words of 4 to 8 small letters in the texts, sorted."""
        found = {word for text in self.texts for sentence in text for word in sentence.split()}
        return sorted(x for x in found if 4 <= len(x) <= 8 and x.isascii() and x.islower())
