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

    def windows(self, tokenizer: Any, num_windows: int, num_tokens: int) -> list[list[int]]:
        """Cuts windows, evenly spaced in each text; the texts have equal shares of them.

        Args:
            tokenizer: A transformers tokenizer.
            num_windows: How many.
            num_tokens: Of each, with what the tokenizer begins a text with.

        Raises:
            ValueError: A text is too short.
        """
        begin: list[int] = list(tokenizer("").input_ids)[:1]
        length = num_tokens - len(begin)
        found = []
        for number, text in enumerate(self.texts[:num_windows]):
            count = len(range(number, num_windows, len(self.texts)))
            tokens: list[int] = tokenizer(
                "".join(text), add_special_tokens=False, verbose=False
            ).input_ids
            rule = f"hold {length} tokens each"
            check(len(tokens) >= length, WHERE, "texts", rule, len(tokens))
            for i in range(count):
                start = (len(tokens) - length) * i // max(count - 1, 1)
                found.append(begin + tokens[start : start + length])
        return found

    @cached_property
    def words(self) -> list[str]:
        """The words of 4 to 8 small letters in the texts, sorted."""
        found = {word for text in self.texts for sentence in text for word in sentence.split()}
        return sorted(x for x in found if 4 <= len(x) <= 8 and x.isascii() and x.islower())
