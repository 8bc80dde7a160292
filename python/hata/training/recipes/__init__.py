"""Recipes: ways to find hash weights, one a file."""

from hata.training.recipes.fit import Fit, Recipe
from hata.training.recipes.hata import HataRecipe
from hata.training.recipes.paper import PaperRecipe
from hata.training.recipes.pca_itq import PcaItqRecipe
from hata.training.recipes.random import RandomRecipe

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (RandomRecipe, PcaItqRecipe, PaperRecipe, HataRecipe)
}

__all__ = ["RECIPES", "Fit", "Recipe"]
