"""What to capture, and which settings of a recipe to change: options of the commands."""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor
from typer import Option

from hata.checks import check, check_int

if TYPE_CHECKING:
    from hata.training.recipes import Recipe

_WHERE = "capture"


@dataclass(frozen=True)
class CaptureOptions:
    """What to capture.

    Raises:
        TypeError: A value has another type.
        ValueError: A value breaks its rule.
    """

    num_sequences: Annotated[int, Option(help="Sequences, each from other documents.")] = 8
    seq_len: Annotated[int, Option(help="Tokens of each sequence.")] = 8192
    num_queries: Annotated[
        int, Option(help="Query positions sampled from each sequence, without replacement.")
    ] = 384
    first_query: Annotated[
        float, Option(help="First position that may be sampled, as a share of --seq-len.")
    ] = 0.0625
    values: Annotated[bool, Option(help="Capture values too, for hata recall.")] = False
    seed: Annotated[int, Option(help="Seed of everything that is drawn.")] = 0
    memory_limit_gb: Annotated[
        float | None,
        Option(help="GB for model, cache and activations; long sequences then run in chunks."),
    ] = None

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_int(_WHERE, "num_sequences", self.num_sequences, 1)
        check_int(_WHERE, "seq_len", self.seq_len, 2)
        check_int(_WHERE, "seed", self.seed, 0)
        first = self.first_query
        check(0.0 <= first < 1.0, _WHERE, "first_query", "be in [0, 1)", first)
        check_int(_WHERE, "num_queries", self.num_queries, 1, self.seq_len - self.first_position)
        limit = self.memory_limit_gb
        check(limit is None or limit > 0, _WHERE, "memory_limit_gb", "be positive", limit)

    @property
    def first_position(self) -> int:
        """The first position whose query may be sampled."""
        return int(self.first_query * self.seq_len)

    def positions(self, sequence_idx: int) -> Tensor:
        """Draws a sequence's query positions: ``[num_queries]``, int64, ascending."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + sequence_idx)
        room = self.seq_len - self.first_position
        drawn = torch.randperm(room, generator=generator)[: self.num_queries]
        return drawn.sort().values + self.first_position


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Which recipe learns hash weights, and its settings where they are not its own."""

    recipe: Annotated[str, Option(help="hata, paper, pca-itq or random.")] = "hata"
    num_bits: Annotated[
        int | None, Option(help="Bits of a key's code; by default the recipe's.")
    ] = None
    query_bits: Annotated[
        int | None, Option(help="Bits of a query's projection; by default the recipe's.")
    ] = None
    key_norms: Annotated[
        bool | None, Option(help="Scale scores by key norms; by default as the recipe does.")
    ] = None
    num_steps: Annotated[int | None, Option(help="Steps of recipe hata.")] = None
    num_keys: Annotated[int | None, Option(help="Keys of a step of recipe hata.")] = None

    def make(self, seed: int) -> "Recipe":
        """Makes the recipe.

        Raises:
            ValueError: There is none of this name, or a setting breaks its rules.
        """
        from hata.training.recipes import RECIPES

        name, where = self.recipe, "train"
        check(name in RECIPES, where, "--recipe", f"be one of {', '.join(RECIPES)}", name)
        known = {field.name for field in fields(RECIPES[name])}
        settings = {key: value for key, value in asdict(self).items() if value is not None}
        del settings["recipe"]
        for key, value in settings.items():
            option = "--" + key.replace("_", "-")
            check(key in known, where, option, f"be left out for recipe {name}", value)
        return RECIPES[name](**settings, seed=seed)
