"""Recipe `random`: rotations that have seen no data, the control."""

from dataclasses import dataclass
from typing import ClassVar

from hata.training.data import TrainingData
from hata.training.recipes.fit import ClosedForm, Recipe, orthogonal


@dataclass(frozen=True)
class RandomRecipe(Recipe):
    """Random rotations: the sign-random-projection hash (Charikar, 2002)."""

    name: ClassVar[str] = "random"

    def fit(self, data: TrainingData) -> ClosedForm:
        """Draws them."""
        return ClosedForm(orthogonal(data, self.num_bits, self.seed))
