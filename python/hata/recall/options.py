"""What ``hata recall`` is asked for."""

from dataclasses import dataclass
from pathlib import Path

import torch

from hata.checks import check, check_int
from hata.outputs import make_output_folder, make_room_for
from hata.recall.measure import MeasureOptions
from hata.training.captures import CaptureInfo

WHERE = "recall"
_SHARES = (256, 128, 64, 32, 16, 8)  # default budgets are these parts of the context: 0.4 to 12.5 %
# Between them the frontier also looks at multiples of 2 ** 0.5.
_FRONTIER_SHARES = (256, 181, 128, 90.5, 64, 45.25, 32, 22.6, 16, 11.3, 8)


@dataclass(frozen=True)
class RecallOptions:
    """The options of ``hata recall``, checked as far as no captures are needed for it.

    Attributes:
        captures: Captures of held-out text.
        device: Where to compute.
        weights: Files of hash weights.
        query_bits: Overrides what the files say; None does not.
        key_norms: Likewise.
        baselines: Whether to measure more selectors than these and the exact one.
        calibration: Captures of other text; None leaves Loki out.
        random_bits: Bits of random codes.
        channels: Channels of Loki and SparQ; empty for head_dim / 4 and / 2.
        page_size: Of Quest's pages.
        top_k: Budgets; empty for 0.4 to 12.5 % of the context.
        num_sink: First positions that every selector takes.
        num_recent: Last positions that every selector takes.
        num_dense_layers: Leading layers that the means leave out.
        num_queries: Queries of each sequence; None for all.
        frontier: JSON file for the frontier, or None.
        csv: CSV file for the means, or None.
        per_head: CSV file for every layer and head, or None.
        plot: Folder for pictures, or None.
        memory_limit_gb: GB for the queries that are measured at once.
        command: The command line, noted in the files.

    Raises:
        ValueError: An option breaks its rule.
    """

    captures: Path
    device: torch.device
    weights: tuple[Path, ...] = ()
    query_bits: int | None = None
    key_norms: bool | None = None
    baselines: bool = True
    calibration: Path | None = None
    random_bits: tuple[int, ...] = (128,)
    channels: tuple[int, ...] = ()
    page_size: int = 16
    top_k: tuple[int, ...] = ()
    num_sink: int = 4
    num_recent: int = 16
    num_dense_layers: int = 2
    num_queries: int | None = None
    frontier: Path | None = None
    csv: Path | None = None
    per_head: Path | None = None
    plot: Path | None = None
    memory_limit_gb: float = 0.25
    command: str = ""

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_int(WHERE, "--num-dense-layers", self.num_dense_layers, 0)
        if self.query_bits is not None:
            check_int(WHERE, "--query-bits", self.query_bits, 1, 4)
        some = self.baselines or len(self.weights) > 0
        check(some, WHERE, "--weights", "be given with --no-baselines", "none")
        rule = "be given with --frontier"
        check(not self.frontier or bool(self.weights), WHERE, "--weights", rule, "none")

    def make_folders(self) -> None:
        """Makes the folders of what will be written.

        Raises:
            ValueError: One cannot be made or written.
        """
        files = {"--frontier": self.frontier, "--csv": self.csv, "--per-head": self.per_head}
        for option, file in files.items():
            if file is not None:
                make_room_for(file, WHERE, option)
        if self.plot is not None:
            make_output_folder(self.plot, WHERE, "--plot")

    def measure_options(self, info: CaptureInfo) -> MeasureOptions:
        """Returns how to measure these captures.

        Args:
            info: Of the captures.

        Raises:
            ValueError: A number does not fit them.
        """
        shares = _FRONTIER_SHARES if self.frontier else _SHARES
        budgets = self.top_k or [round(info.seq_len / share) for share in shares]
        rule = f"be less than the model's {info.num_layers} layers"
        sparse = self.num_dense_layers < info.num_layers
        check(sparse, WHERE, "--num-dense-layers", rule, self.num_dense_layers)
        return MeasureOptions(
            budgets=tuple(sorted(set(budgets))),
            device=self.device,
            num_sink=self.num_sink,
            num_recent=self.num_recent,
            num_queries=self.num_queries,
            memory_limit_gb=self.memory_limit_gb,
        )
