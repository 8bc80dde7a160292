"""Budgets of each layer's own, from a file."""

import json
from dataclasses import dataclass
from pathlib import Path

from hata.checks import check
from hata.config import HataConfig
from hata.eval.options import EvalOptions
from hata.eval.prose import WHERE

_OPTION = "--layer-budgets"


@dataclass(frozen=True)
class BudgetFile:
    """Levels as ``hata recall --frontier`` writes them: one budget for all layers, or shared out.

    Attributes:
        name: Of the file.
        num_dense_layers: The model's leading layers that stay dense with them.
        levels: ``top_k`` of each of the model's layers, by the one ``top_k`` that costs as much.
    """

    name: str
    num_dense_layers: int
    levels: dict[int, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path, options: EvalOptions) -> "BudgetFile":
        """Reads a file.

        Raises:
            ValueError: It is no such file, its codes differ in their number of bits, or its number
                of dense layers is not asked for.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(level["uniform"], level["per_layer"]) for level in found["levels"]]
            bits = {n for alike, own in pairs for n in (alike["num_bits"], *own["num_bits"])}
            levels = {alike["top_k"]: tuple(own["top_k"]) for alike, own in pairs}
            num_dense = found["num_dense_layers"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            rule = f"name files of hata recall --frontier, got {path}: {error}"
            raise ValueError(f"hata.{WHERE}: {_OPTION} must {rule}") from error
        rule = "name files of one number of bits"
        check(len(bits) == 1, WHERE, _OPTION, rule, f"{path} with {sorted(bits)}")
        asked = options.num_dense_layers
        rule = f"include {num_dense}, as {path} has it"
        check(num_dense in asked, WHERE, "--num-dense-layers", rule, asked)
        return cls(path.name, num_dense, levels)

    def top_k(self, top_k: int, num_layers: int, options: EvalOptions) -> tuple[int, ...]:
        """Returns ``top_k`` of each layer.

        Args:
            top_k: What all layers have at the level.
            num_layers: Layers of the model.
            options: What every budget includes.

        Raises:
            ValueError: There is no such level, or it is another model's.
        """
        known = ", ".join(map(str, self.levels))
        rule = f"be one of {known} with {_OPTION} {self.name}"
        check(top_k in self.levels, WHERE, "--top-k", rule, top_k)
        own, always = self.levels[top_k], (options.num_sink, options.num_recent)
        HataConfig(own, num_sink=always[0], num_recent=always[1]).layer_top_k(num_layers)  # checks
        return own
