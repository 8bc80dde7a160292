"""What `hata train` trains and evaluates on, as its options say."""

import re
from pathlib import Path

from hata.checks import check
from hata.training.captures import Captures
from hata.training.source import CapturedSource, SyntheticSource

_WHERE = "train"
_SIZES = ("num_layers", "num_heads", "num_kv_heads", "head_dim")


def synthetic_source(
    text: str,
    *,
    num_sequences: int,
    seq_len: int,
    num_queries: int,
    num_sink: int,
    num_recent: int,
) -> SyntheticSource:
    """Makes a source of random numbers.

    Args:
        text: "layers x heads x KV heads x head_dim", without spaces.
        num_sequences: As for `SyntheticSource`, like the rest.
        seq_len: Tokens of each sequence.
        num_queries: Query tokens of each.
        num_sink: First positions that are always selected.
        num_recent: Last positions that are always selected.

    Raises:
        ValueError: The text is not as above.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    sizes = [int(size) for size in found.groups()] if found else [0] * 4
    whole = min(sizes) > 0 and sizes[1] % sizes[2] == 0
    rule = "be layers x heads x KV heads x head_dim, such as 32x32x8x128"
    check(whole, _WHERE, "--synthetic", rule, text)
    layers, heads, num_kv_heads, head_dim = sizes
    return SyntheticSource(
        layers,
        heads,
        num_kv_heads,
        head_dim,
        num_sequences=num_sequences,
        seq_len=seq_len,
        num_queries=num_queries,
        num_sink=num_sink,
        num_recent=num_recent,
    )


def captured_sources(
    folder: Path, heldout: Path | None, *, num_sink: int, num_recent: int
) -> tuple[CapturedSource, CapturedSource, dict[str, str]]:
    """Opens captures.

    Args:
        folder: Captures to train on.
        heldout: Captures to evaluate on; None takes the last sequence of the others.
        num_sink: First positions that are always selected.
        num_recent: Last positions that are always selected.

    Returns:
        What to train on, what to evaluate on, and what to note about them in the metadata.

    Raises:
        ValueError: A folder holds no complete capture, or the two are of different models.
    """
    found = Captures.open(folder)
    count = found.info.num_sequences
    if heldout is None:
        rule = "be given where the captures hold one sequence"
        check(count > 1, _WHERE, "--heldout", rule, "nothing")
        other, train_on, test_on = found, range(count - 1), range(count - 1, count)
    else:
        other = Captures.open(heldout)
        train_on, test_on = range(count), range(other.info.num_sequences)
    for size in _SIZES:
        wanted, got = getattr(found.info, size), getattr(other.info, size)
        check(wanted == got, _WHERE, f"{size} of --heldout", f"be {wanted}", got)
    return (
        CapturedSource(found, train_on, num_sink, num_recent),
        CapturedSource(other, test_on, num_sink, num_recent),
        {
            "model": found.info.model,
            "trained_on": " | ".join(found.info.texts[i] for i in train_on),
            "heldout": " | ".join(other.info.texts[i] for i in test_on),
        },
    )
