"""What `hata demo` prints and draws."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from hata.config import HataConfig
from hata.demo.generate import Generation
from hata.demo.options import WHERE
from hata.pictures import picture
from hata.weights import HashWeights


@dataclass(frozen=True)
class Bytes:
    """Bytes of cache that one decoding step reads, summed over the layers with hash weights.

    A dense layer reads ``seq_len * num_kv_heads * 2 * head_dim * itemsize``. A sparse one reads its
    codes, ``seq_len * num_kv_heads * num_bits / 8`` (2 more bytes for each norm), and the keys and
    values of its selected positions, ``num_selected * num_kv_heads * 2 * head_dim * itemsize``.
    """

    dense: int
    hata: int

    @classmethod
    def of_step(
        cls, config: HataConfig, weights: HashWeights, *, itemsize: int, seq_len: int
    ) -> "Bytes":
        """Counts the bytes of one step at ``seq_len`` positions, which the demo selects from."""
        num_layers, num_kv_heads, head_dim, _ = weights.shape
        row = num_kv_heads * 2 * head_dim * itemsize
        num_dense = sum(layer < config.num_dense_layers for layer in weights.layers)
        layers = zip(weights.layer_bits, config.layer_budgets(num_layers, seq_len), strict=True)
        sparse = sum(
            seq_len * num_kv_heads * (num_bits // 8 + 2 * weights.key_norms)
            + min(budget.top_k, seq_len) * row
            for num_bits, budget in list(layers)[num_dense:]
        )
        return cls(num_layers * seq_len * row, num_dense * seq_len * row + sparse)


def agreement(dense: list[int], hata: list[int]) -> str:
    """Says whether two answers agree, token for token."""
    if dense == hata:
        return f"yes, in all {len(dense)} tokens"
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(dense, hata, strict=False))))
    return f"no, in the first {same} of {max(len(dense), len(hata))} tokens"


def print_answers(
    console: Console,
    answers: Mapping[str, str],
    number: str,
    generations: Mapping[str, Generation],
    read: Bytes,
) -> None:
    """Prints both generations side by side."""
    table = Table("", *answers, title="One prompt, two generations")
    table.add_row("answer", *(text.strip() for text in answers.values()))
    table.add_row("number found", *("yes" if number in text else "no" for text in answers.values()))
    runs = generations.values()
    table.add_row("prompt and first token", *(f"{run.prefill_seconds:.2f} s" for run in runs))
    table.add_row("each further token", *(f"{run.milliseconds_per_token:.1f} ms" for run in runs))
    share = f"{read.hata / 1e6:.2f} MB, {read.hata / read.dense:.0%}"
    table.add_row("full-attention cache read", f"{read.dense / 1e6:.2f} MB", share)
    console.print(table)


def print_mass(console: Console, mass: Mapping[int, float], num_layers: int) -> None:
    """Prints the selected share of the dense attention mass, layer by layer."""
    table = Table("layer", "share", "", title="Dense attention mass at the selected positions")
    for layer in range(num_layers):
        share = mass.get(layer)
        if share is None:
            table.add_row(str(layer), "dense", "")
        else:
            bar = ProgressBar(total=1.0, completed=share, width=40)
            table.add_row(str(layer), f"{share:.1%}", bar)
    console.print(table)
    if mass:
        mean = sum(mass.values()) / len(mass)
        console.print(f"mean over the {len(mass)} sparse layers: {mean:.1%}")


def plot_mass(path: Path, mass: Mapping[int, float], num_layers: int, title: str) -> None:
    """Writes a bar for each layer: the share of the dense attention mass that was selected.

    Args:
        path: The PNG file to write.
        mass: Share by layer, 0 to 1; layers that are not in it attend densely.
        num_layers: Layers of the model.
        title: The line above the bars.
    """
    layers = range(num_layers)
    with picture(path, WHERE, 7, 3) as figure:
        axes = figure.subplots()
        colors = ["tab:blue" if layer in mass else "lightgray" for layer in layers]
        axes.bar(layers, [mass.get(layer, 1.0) for layer in layers], color=colors)
        axes.set(xlabel="layer (gray: dense)", ylabel="share of attention mass", ylim=(0, 1))
        axes.set_title(title)
