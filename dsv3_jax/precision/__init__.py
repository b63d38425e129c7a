"""Numeric recipes: in which format the products of a model run.

`linear`, `grouped_linear` and `swiglu_linear` are the model's only weight products; `recipe` has the table of what FP8 computes.
"""

from dsv3_jax.precision.fp8 import Activation, keep, quantise
from dsv3_jax.precision.linear import Weight, grouped_linear, linear, silu_gate, swiglu_linear
from dsv3_jax.precision.recipe import BF16, FLOAT32, FP8, FP8_REFERENCE, FP8_WEIGHTS, Recipe, Scales, check_devices, recipe
from dsv3_jax.precision.tap import Tap, weight_gradient
from dsv3_jax.precision.weights import (
    CastWeight,
    FP8Weight,
    attach,
    detach,
    forms,
    fp8_axes,
    from_fp8,
    has_fp8,
    is_counter,
    overflow_counters,
    to_fp8,
)

__all__ = [
    "BF16",
    "FLOAT32",
    "FP8",
    "FP8_REFERENCE",
    "FP8_WEIGHTS",
    "Activation",
    "CastWeight",
    "FP8Weight",
    "Recipe",
    "Scales",
    "Tap",
    "Weight",
    "attach",
    "check_devices",
    "detach",
    "forms",
    "fp8_axes",
    "from_fp8",
    "grouped_linear",
    "has_fp8",
    "is_counter",
    "keep",
    "linear",
    "overflow_counters",
    "quantise",
    "recipe",
    "silu_gate",
    "swiglu_linear",
    "to_fp8",
    "weight_gradient",
]
