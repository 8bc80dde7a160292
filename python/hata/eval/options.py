"""What ``hata eval`` is asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from typer import Argument, Option

from hata.checks import check, check_int
from hata.config import HataConfig
from hata.device import ModelOptions, torch_device, torch_dtype
from hata.eval.completion import COMPLETIONS
from hata.eval.prose import WHERE
from hata.eval.tasks import LIKELIHOOD, TASKS
from hata.outputs import make_output_folder, make_room_for
from hata.recall.options import TOP_K_METAVAR, LineupOptions, chosen_budgets

_DEFAULT = HataConfig()
NUM_LEADING = 2  # first layers that `--leading-top-k` is of
_SHARES = (64, 32, 16)  # default budgets are these parts of the context: 1.56 to 6.25 %


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions, LineupOptions):
    """The options of ``hata eval``, checked as far as no model is needed for it.

    Raises:
        TypeError: A value has another type.
        ValueError: A value breaks its rule.
    """

    texts: Annotated[
        list[Path],
        Argument(help="Text files or folders that nothing was trained on; by default pydoc's."),
    ] = field(default_factory=list)
    csv: Annotated[Path, Option(help="CSV file to write; rows that it has are not run again.")] = (
        Path("eval.csv")
    )
    report: Annotated[
        Path | None, Option(help="Write report.md and PNG files into this folder.")
    ] = None
    task: Annotated[list[str], Option(help="Repeatable; by default all of them.")] = field(
        default_factory=lambda: [LIKELIHOOD, *TASKS]
    )
    dataset: Annotated[
        list[Path],
        Option(help="Folder with questions of RULER or LongBench to answer too; repeatable."),
    ] = field(default_factory=list)
    method: Annotated[
        list[str], Option(help="Names of selectors to run, such as exact; by default all.")
    ] = field(default_factory=list)
    context: Annotated[
        list[int], Option(help="Tokens of prompt and answer together; repeatable.")
    ] = field(default_factory=lambda: [2048])
    top_k: Annotated[
        list[float],
        Option(
            metavar=TOP_K_METAVAR,
            help="Budgets, or shares of the context, by default 1.56, 3.1 and 6.2 % of it.",
        ),
    ] = field(default_factory=list)
    num_dense_layers: Annotated[
        list[int], Option(help="Leading layers that stay dense; repeatable.")
    ] = field(default_factory=lambda: [_DEFAULT.num_dense_layers])
    share_layers: Annotated[
        list[str],
        Option(
            metavar="COUNT|LAYERS",
            help="Sparse layers in a row that share a selection, or the layers that select, such "
            "as 2,5,9; repeatable.",
        ),
    ] = field(default_factory=lambda: ["1"])
    leading_top_k: Annotated[
        list[float],
        Option(
            metavar=TOP_K_METAVAR,
            help=f"Other budgets of the first {NUM_LEADING} layers, where they are sparse.",
        ),
    ] = field(default_factory=list)
    layer_budgets: Annotated[
        list[Path],
        Option(
            help="Measure the budgets of each layer's own in this file of hata recall --frontier "
            "too, at each --top-k; repeatable."
        ),
    ] = field(default_factory=list)
    choose_on: Annotated[
        list[Path],
        Option(
            help="Texts to choose budgets on, by the KL that each layer costs, for a "
            "--layer-budgets file that is not there yet; repeatable."
        ),
    ] = field(default_factory=list)
    completion: Annotated[
        list[str],
        Option(
            help="Complete what hash codes leave out too, an experiment; repeatable: "
            f"{', '.join(COMPLETIONS)}."
        ),
    ] = field(default_factory=list)
    depth: Annotated[
        list[float], Option(help="Depths of the single needle, 0 (first) to 1 (last).")
    ] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    num_samples: Annotated[
        int, Option(help="Windows or prompts of each task, context and depth.")
    ] = 8
    num_decoded: Annotated[
        int, Option(help="Last tokens of a window that are decoded, for likelihood.")
    ] = 128
    num_sink: Annotated[int, Option(help="First positions that all take, inside the budget.")] = (
        _DEFAULT.num_sink
    )
    num_recent: Annotated[int, Option(help="Last positions that all take, inside the budget.")] = (
        _DEFAULT.num_recent
    )
    seed: Annotated[int, Option(help="Chooses texts, facts and depths.")] = 0

    def __post_init__(self) -> None:
        """Checks every rule."""
        super().__post_init__()
        for task in self.task:
            known = task == LIKELIHOOD or task in TASKS
            check(known, WHERE, "--task", f"be one of {', '.join([LIKELIHOOD, *TASKS])}", task)
        for name in ("task", "context", "num_dense_layers", "share_layers", "depth"):
            check(len(getattr(self, name)) > 0, WHERE, name, "have an entry", "none")
        for context in self.context:
            check_int(WHERE, "--context", context, 32)
        for depth in self.depth:
            check(0.0 <= depth <= 1.0, WHERE, "--depth", "be in 0..1", depth)
        for layers in self.num_dense_layers:
            check_int(WHERE, "--num-dense-layers", layers, 0)
        if self.choose_on:
            for name in ("layer_budgets", "context", "num_dense_layers"):
                given = getattr(self, name)
                rule, option = "be given once with --choose-on", f"--{name.replace('_', '-')}"
                check(len(given) == 1, WHERE, option, rule, ", ".join(map(str, given)) or "none")
        self.share_selections()
        for name in self.completion:
            rule = f"be one of {', '.join(COMPLETIONS)}"
            check(name in COMPLETIONS, WHERE, "--completion", rule, name)
        check_int(WHERE, "--num-samples", self.num_samples, 1)
        check_int(WHERE, "--num-decoded", self.num_decoded, 3, min(self.context) // 2)
        check_int(WHERE, "--num-sink", self.num_sink, 0)
        check_int(WHERE, "--num-recent", self.num_recent, 0)
        for context in self.context:
            low, rule = self.num_sink + self.num_recent, "be at least num_sink + num_recent"
            smallest = min(self.budgets(context) + self.leading_budgets(context))
            check(smallest >= max(1, low), WHERE, "--top-k", f"{rule}={low}", smallest)
        check_int(WHERE, "--seed", self.seed, 0)
        self.torch_dtype()

    def budgets(self, context: int) -> list[int]:
        """Returns the positions that each KV head may attend to, ascending."""
        least = 2 * (self.num_sink + self.num_recent)  # of the defaults
        given = chosen_budgets(WHERE, self.top_k, context)
        return sorted(given or {max(context // share, least) for share in _SHARES})

    def leading_budgets(self, context: int) -> list[int]:
        """Returns the positions that leading layers may attend to where others have fewer."""
        return sorted(chosen_budgets(WHERE, self.leading_top_k, context))

    def share_selections(self) -> dict[str, int | tuple[int, ...]]:
        """Returns what `hata.HataConfig.share_selection` takes, by how it was written."""
        found: dict[str, int | tuple[int, ...]] = {}
        for text in self.share_layers:
            numbers = text.split(",")
            are = all(number.isdecimal() for number in numbers) and text != "0"
            rule = "be a number of layers from 1 on, or layers such as 2,5,9"
            check(are, WHERE, "--share-layers", rule, text)
            layers = tuple(map(int, numbers))
            found[text] = HataConfig(
                share_selection=layers if len(layers) > 1 else layers[0]
            ).share_selection
        return found

    def torch_device(self) -> torch.device:
        """Returns the device to run on."""
        return torch_device(self.device, WHERE)

    def torch_dtype(self) -> torch.dtype:
        """Returns the dtype to run in."""
        return torch_dtype(self.dtype, self.torch_device(), WHERE)

    def make_folders(self) -> None:
        """Makes the folders of what will be written.

        Raises:
            ValueError: One cannot be made or written.
        """
        make_room_for(self.csv, WHERE, "--csv")
        for path in self.layer_budgets if self.choose_on else []:
            make_room_for(path, WHERE, "--layer-budgets")
        if self.report is not None:
            make_output_folder(self.report, WHERE, "--report")
