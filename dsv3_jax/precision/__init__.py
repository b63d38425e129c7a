"""Numeric recipes: in which format the products of a model run. `linear` and `grouped_linear` are its only weight products."""

from dsv3_jax.precision.linear import Tap, grouped_linear, linear, weight_gradient
from dsv3_jax.precision.recipe import BF16, FLOAT32, FP8_WEIGHTS, Recipe, recipe
from dsv3_jax.precision.weights import dense, fp8_axes, from_fp8, to_fp8

__all__ = [
    "BF16",
    "FLOAT32",
    "FP8_WEIGHTS",
    "Recipe",
    "Tap",
    "dense",
    "fp8_axes",
    "from_fp8",
    "grouped_linear",
    "linear",
    "recipe",
    "to_fp8",
    "weight_gradient",
]
