"""What ``hata recall`` is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from typer import Argument, Option

from hata.checks import check, check_int
from hata.config import HataConfig, check_budget, positions_of
from hata.device import DeviceName, torch_device
from hata.outputs import make_output_folder, make_room_for

WHERE = "recall"
TOP_K_METAVAR = "COUNT|SHARE"
_DEFAULT = HataConfig()
_SHARES = (256, 128, 64, 32, 16, 8)  # default budgets are these parts of the context: 0.4 to 12.5 %
# Between them the frontier also looks at multiples of 2 ** 0.5.
_FRONTIER_SHARES = (256, 181, 128, 90.5, 64, 45.25, 32, 22.6, 16, 11.3, 8)


def chosen_budgets(function: str, top_k: Sequence[float], seq_len: int) -> set[int]:
    """Returns the budgets of ``--top-k`` in positions.

    Args:
        function: What the option is of.
        top_k: Counts, and shares of the context.
        seq_len: Tokens of the context.

    Raises:
        ValueError: One is neither.
    """
    budgets = [int(x) if float(x).is_integer() else x for x in top_k]
    for budget in budgets:
        check_budget(function, "--top-k", budget)
    return {positions_of(budget, seq_len) for budget in budgets}


@dataclass(frozen=True, kw_only=True)
class LineupOptions:
    """Which selectors to compare; ``hata eval`` has these options too.

    Raises:
        TypeError: A value has another type.
        ValueError: A value breaks its rule.
    """

    weights: Annotated[list[Path], Option(help="Hash weights to measure; repeat it for more.")] = (
        field(default_factory=list)
    )
    query_bits: Annotated[
        int | None, Option(help="Bits of a query's projection, if not as trained.")
    ] = None
    key_norms: Annotated[
        bool | None,
        Option("--key-norms/--no-key-norms", help="Whether to use norms, if not as trained."),
    ] = None
    baselines: Annotated[bool, Option(help="Measure random codes and published methods too.")] = (
        True
    )
    calibration: Annotated[
        Path | None,
        Option(help="Captures of training text: to fit Loki on, and to choose --frontier on."),
    ] = None
    random_bits: Annotated[list[int], Option(help="Bits of random codes; repeatable.")] = field(
        default_factory=lambda: [128]
    )
    channels: Annotated[
        list[int], Option(help="Channels of Loki and SparQ, by default head_dim / 4 and / 2.")
    ] = field(default_factory=list)
    page_size: Annotated[int, Option(help="Keys of one of Quest's pages.")] = 16
    hash_attention_steps: Annotated[
        int,
        Option(help="Steps to train HashAttention for each layer, on --calibration; 0: leave out."),
    ] = 0

    def __post_init__(self) -> None:
        """Checks every rule."""
        if self.query_bits is not None:
            check_int(WHERE, "--query-bits", self.query_bits, 1, 4)
        check_int(WHERE, "--hash-attention-steps", self.hash_attention_steps, 0)
        trainable = self.calibration is not None or self.hash_attention_steps == 0
        rule = "be given with --hash-attention-steps"
        check(trainable, WHERE, "--calibration", rule, "none")


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How to measure selectors.

    Raises:
        TypeError: A value has another type.
        ValueError: A value breaks its rule.
    """

    top_k: Annotated[
        list[float],
        Option(
            metavar=TOP_K_METAVAR,
            help="Budgets, or shares of the context, by default 0.4 to 12.5 % of it.",
        ),
    ] = field(default_factory=list)
    num_sink: Annotated[int, Option(help="First positions that all take, inside the budget.")] = (
        _DEFAULT.num_sink
    )
    num_recent: Annotated[int, Option(help="Last positions that all take, inside the budget.")] = (
        _DEFAULT.num_recent
    )
    num_queries: Annotated[
        int | None,
        Option(help="Queries of each sequence, evenly spaced; by default all captured ones."),
    ] = None
    memory_limit_gb: Annotated[
        float, Option(help="GB for the queries that are measured at once.")
    ] = 0.25
    device: DeviceName = None

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_int(WHERE, "num_sink", self.num_sink, 0)
        check_int(WHERE, "num_recent", self.num_recent, 0)
        if self.num_queries is not None:
            check_int(WHERE, "num_queries", self.num_queries, 1)
        limit = self.memory_limit_gb
        check(limit > 0, WHERE, "memory_limit_gb", "be positive", limit)
        self.torch_device()

    def torch_device(self) -> torch.device:
        """Returns the device to measure on."""
        return torch_device(self.device, WHERE)

    def budgets(self, seq_len: int, shares: Sequence[float] = _SHARES) -> tuple[int, ...]:
        """Returns the positions that each KV head may select, ascending.

        Args:
            seq_len: Tokens of the context, which the default budgets are shares of.
            shares: One over each of them.

        Raises:
            ValueError: One leaves no room for the sink and recent positions.
        """
        given = chosen_budgets(WHERE, self.top_k, seq_len)
        budgets = sorted(given or {round(seq_len / share) for share in shares})
        low = max(1, self.num_sink + self.num_recent)
        rule = f"be at least num_sink + num_recent={low}"
        check(budgets[0] >= low, WHERE, "top_k", rule, budgets[0])
        return tuple(budgets)


@dataclass(frozen=True, kw_only=True)
class RecallOptions(MeasureOptions, LineupOptions):
    """The options of ``hata recall``, checked as far as no captures are needed for it.

    Raises:
        ValueError: An option breaks its rule.
    """

    captures: Annotated[Path, Argument(help="Captures of held-out text (hata capture --values).")]
    num_dense_layers: Annotated[int, Option(help="Leading layers that the means leave out.")] = (
        _DEFAULT.num_dense_layers
    )
    frontier: Annotated[
        Path | None,
        Option(
            help="Find the best num_bits and top_k for the bytes read, overall and per layer, "
            "among weights that differ in num_bits alone; write them to this JSON file."
        ),
    ] = None
    share_selection: Annotated[
        Path | None,
        Option(
            help="Find the layers that select best for those after them, for every number of "
            "them, with the first --weights; write them to this JSON file."
        ),
    ] = None
    csv: Annotated[Path | None, Option(help="Write the means to this CSV file.")] = None
    per_head: Annotated[
        Path | None, Option(help="Write every layer and KV head to this CSV file.")
    ] = None
    plot: Annotated[Path | None, Option(help="Write PNG files into this folder.")] = None

    def __post_init__(self) -> None:
        """Checks every rule."""
        MeasureOptions.__post_init__(self)
        LineupOptions.__post_init__(self)
        check_int(WHERE, "--num-dense-layers", self.num_dense_layers, 0)
        some = self.baselines or len(self.weights) > 0
        check(some, WHERE, "--weights", "be given with --no-baselines", "none")
        rule = "be given with --frontier"
        check(not self.frontier or bool(self.weights), WHERE, "--weights", rule, "none")
        rule = "be given with --share-selection"
        check(not self.share_selection or bool(self.weights), WHERE, "--weights", rule, "none")

    def make_folders(self) -> None:
        """Makes the folders of what will be written.

        Raises:
            ValueError: One cannot be made or written.
        """
        files = {"--frontier": self.frontier, "--csv": self.csv, "--per-head": self.per_head}
        files["--share-selection"] = self.share_selection
        for option, file in files.items():
            if file is not None:
                make_room_for(file, WHERE, option)
        if self.plot is not None:
            make_output_folder(self.plot, WHERE, "--plot")

    def budgets(self, seq_len: int, shares: Sequence[float] = _SHARES) -> tuple[int, ...]:
        """Returns the budgets; the frontier looks at more."""
        return super().budgets(seq_len, _FRONTIER_SHARES if self.frontier else shares)
