"""Where training data comes from: captures on disk, or random numbers for timing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hata.checks import check
from hata.training.captures import FULL_ATTENTION, CaptureInfo, Captures
from hata.training.data import TrainingData
from hata.training.options import CaptureOptions

_WHERE = "train"


@dataclass(frozen=True)
class Source:
    """Some sequences of a capture.

    Attributes:
        captures: The capture.
        sequences: Which of its sequences.
        num_sink: First positions that are always selected.
        num_recent: Last positions that are always selected.
    """

    captures: Captures
    sequences: range
    num_sink: int
    num_recent: int

    @property
    def num_layers(self) -> int:
        """Captured layers."""
        return self.captures.info.num_layers

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """num_sequences, num_queries, group, num_kv_heads, seq_len, head_dim of a layer."""
        info = self.captures.info
        sizes = (info.num_queries, info.group, info.num_kv_heads, info.seq_len, info.head_dim)
        return (len(self.sequences), *sizes)

    @property
    def texts(self) -> str:
        """Where the sequences come from."""
        return " | ".join(self.captures.info.texts[i] for i in self.sequences)

    def load(self, layers: Sequence[int], device: torch.device) -> TrainingData:
        """Reads these layers."""
        num_sequences, num_queries, group, num_kv_heads, seq_len, head_dim = self.shape
        heads = len(layers) * num_kv_heads
        q = torch.empty(num_sequences, heads, num_queries, group, head_dim, device=device)
        k = torch.empty(num_sequences, heads, seq_len, head_dim, device=device)
        positions = torch.empty(num_sequences, num_queries, dtype=torch.int64, device=device)
        sinks = torch.full((heads, group), -torch.inf, device=device)  # a sink that takes nothing
        for row, sequence_idx in enumerate(self.sequences):
            for i, layer_idx in enumerate(layers):
                found = self.captures.shard(sequence_idx, layer_idx, device)
                of_layer = slice(i * num_kv_heads, (i + 1) * num_kv_heads)
                groups = found["q"].unflatten(1, (num_kv_heads, group))
                q[row, of_layer].copy_(groups.permute(1, 0, 2, 3))
                k[row, of_layer].copy_(found["k"].transpose(0, 1))
                positions[row].copy_(found["positions"])
                if "sink_logits" in found:
                    sinks[of_layer].copy_(found["sink_logits"])
        softmax = self.captures.info.softmax(None if bool(sinks.isinf().all()) else sinks)
        angles = self.captures.info.rotary
        rotary = torch.tensor(angles, dtype=torch.float64, device=device) if angles else None
        always = (self.num_sink, self.num_recent)
        return TrainingData(tuple(layers), q, k, positions, softmax, *always, rotary)


def captured_sources(
    folder: Path, heldout: Path | None, *, num_sink: int, num_recent: int
) -> tuple[Source, Source]:
    """Opens captures to train on and to evaluate on.

    Args:
        folder: Captures to train on.
        heldout: Captures to evaluate on; None takes the last sequence of the others.
        num_sink: First positions that are always selected.
        num_recent: Last positions that are always selected.

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
    for size in ("layers", "num_heads", "num_kv_heads", "head_dim"):
        wanted, got = getattr(found.info, size), getattr(other.info, size)
        check(wanted == got, _WHERE, f"{size} of --heldout", f"be {wanted}", got)
    always = {"num_sink": num_sink, "num_recent": num_recent}
    return Source(found, train_on, **always), Source(other, test_on, **always)


@dataclass(frozen=True)
class RandomCaptures(Captures):
    """Random numbers of a model's shape: what training costs, not what it learns."""

    def shard(
        self, sequence_idx: int, layer_idx: int, device: torch.device, *, with_values: bool = False
    ) -> dict[str, Tensor]:
        """Draws queries of the second half of a sequence, and keys: the same in every call."""
        info = self.info
        generator = torch.Generator(device)
        generator.manual_seed(sequence_idx * info.num_layers + layer_idx)
        first = info.seq_len // 2
        step = (info.seq_len - first) / info.num_queries
        row = (info.num_kv_heads, info.head_dim)
        queries = (info.num_queries, info.num_heads, info.head_dim)
        return {
            "q": torch.randn(queries, generator=generator, device=device),
            "k": torch.randn(info.seq_len, *row, generator=generator, device=device),
            "positions": first + (torch.arange(info.num_queries, device=device) * step).long(),
        }


def random_source(text: str, sizes: CaptureOptions, *, num_sink: int, num_recent: int) -> Source:
    """Makes a source of random numbers.

    Args:
        text: "layers x heads x KV heads x head_dim", without spaces.
        sizes: How many sequences, tokens and queries.
        num_sink: First positions that are always selected.
        num_recent: Last positions that are always selected.

    Raises:
        ValueError: The text is not as above.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    layers, heads, num_kv_heads, head_dim = map(int, found.groups()) if found else (0,) * 4
    whole = min(layers, heads, num_kv_heads, head_dim) > 0 and heads % num_kv_heads == 0
    rule = "be layers x heads x KV heads x head_dim, such as 32x32x8x128"
    check(whole, _WHERE, "--synthetic", rule, text)
    info = CaptureInfo(
        model=f"random numbers, {text}",
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        softmax_scale=head_dim**-0.5,
        seq_len=sizes.seq_len,
        num_queries=sizes.num_queries,
        dtype="float32",
        seed=0,
        has_values=False,
        texts=("random numbers",) * sizes.num_sequences,
        layer_types=(FULL_ATTENTION,) * layers,
    )
    sequences = range(sizes.num_sequences)
    return Source(RandomCaptures(Path(text), info), sequences, num_sink, num_recent)
