"""Token sequences of one length out of text files."""

import itertools
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hata.checks import check

_WHERE = "capture"
_CHARACTERS_PER_TOKEN = 16  # more than tokenizers reach on prose and code
_LONG = 5  # characters for each token wanted: a document with more surely has as many tokens


@dataclass(frozen=True)
class TokenSequence:
    """Tokens to run a model over.

    Attributes:
        token_ids: ``seq_len`` of them.
        text: Which files they come from, with the range of characters.
    """

    token_ids: list[int]
    text: str


def text_files(paths: Iterable[Path]) -> list[Path]:
    """Returns the files among ``paths`` and in its folders, sorted.

    Args:
        paths: Files and folders.

    Raises:
        ValueError: One does not exist, or there is no file.
    """
    files: set[Path] = set()
    for path in paths:
        check(path.exists(), _WHERE, "texts", "name existing files or folders", path)
        inside = path.rglob("*") if path.is_dir() else [path]
        files.update(file for file in inside if file.is_file())
    check(len(files) > 0, _WHERE, "texts", "hold at least one file", "none")
    return sorted(files)


def token_sequences(
    tokenizer: Any,
    files: list[Path],
    *,
    num_sequences: int,
    seq_len: int,
    seed: int,
) -> list[TokenSequence]:
    """Cuts ``num_sequences`` sequences of ``seq_len`` tokens out of different documents.

    The folders take turns in giving a document; in each, documents long enough to fill a sequence
    alone come first, in random order. Shorter ones are put one after the other. A document is used
    again only where there are too few. At most ``16 seq_len`` characters of it are read, from a
    random line on.

    Args:
        tokenizer: A transformers tokenizer.
        files: The documents, UTF-8 text.
        num_sequences: Sequences to make.
        seq_len: Tokens of each, including what the tokenizer begins a text with.
        seed: Chooses documents and lines.

    Raises:
        ValueError: The files hold too little text, or one of them is no UTF-8 text.
    """
    chosen = random.Random(seed)
    waiting = deque(_in_turns(files, seq_len, chosen))
    leftover: deque[tuple[str, list[int]]] = deque()
    begin: list[int] = list(tokenizer("").input_ids)[:1]
    sequences: list[TokenSequence] = []
    for _ in range(num_sequences):
        token_ids, origins = list(begin), []
        while len(token_ids) < seq_len and (waiting or leftover):
            if waiting:
                name, tokens = _read(tokenizer, waiting.popleft(), seq_len, chosen)
            else:
                name, tokens = leftover.popleft()
            room = seq_len - len(token_ids)
            token_ids += tokens[:room]
            origins.append(name)
            if len(tokens) > room:
                leftover.append((name, tokens[room:]))
        rule = f"hold {num_sequences} x {seq_len} tokens"
        got = len(sequences) * seq_len + len(token_ids)
        check(len(token_ids) == seq_len, _WHERE, "texts", rule, got)
        sequences.append(TokenSequence(token_ids, "; ".join(origins)))
    return sequences


def _in_turns(files: list[Path], seq_len: int, chosen: random.Random) -> list[Path]:
    """Orders documents: folder by folder in turns, long ones first, else at random."""
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    for inside in folders.values():
        chosen.shuffle(inside)
        inside.sort(key=lambda file: file.stat().st_size < _LONG * seq_len)  # stable
    turns = itertools.zip_longest(*folders.values())
    return [file for turn in turns for file in turn if file is not None]


def _read(tokenizer: Any, file: Path, seq_len: int, chosen: random.Random) -> tuple[str, list[int]]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"hata.{_WHERE}: {file} must be UTF-8 text, got {error}") from error
    check("\0" not in text, _WHERE, str(file), "be UTF-8 text", "NUL bytes")
    length = seq_len * _CHARACTERS_PER_TOKEN
    start = chosen.randrange(max(len(text) - length, 0) + 1)
    start = text.rfind("\n", 0, start) + 1
    piece = text[start : start + length]
    tokens: list[int] = tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    return f"{file.name}[{start}:{start + len(piece)}]", tokens
