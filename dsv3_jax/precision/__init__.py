"""Numeric recipes: in which format the products of a model run. `linear` and `grouped_linear` are its only weight products."""

from dsv3_jax.precision.linear import Tap, grouped_linear, linear, weight_gradient
from dsv3_jax.precision.recipe import BF16, FLOAT32, Recipe, recipe

__all__ = ["BF16", "FLOAT32", "Recipe", "Tap", "grouped_linear", "linear", "recipe", "weight_gradient"]
