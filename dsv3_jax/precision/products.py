"""Unquantised dense products of a recipe."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.precision.recipe import Recipe


def einsum(axes: str, a: jax.Array, b: jax.Array, recipe: Recipe, out_dtype: Any) -> jax.Array:
    """`jnp.einsum` of two operands, accumulated in float32.

    With `recipe.in_parts`: float32 operands are cut into three bfloat16 parts, each the rounded rest of those before, and the six products
    that matter are summed; what is left out is of the size of float32's own rounding. A bfloat16 operand is its own only part.
    """
    if not recipe.in_parts:
        return jnp.einsum(axes, a, b, precision=recipe.product_precision, preferred_element_type=out_dtype)
    parts_of_a, parts_of_b = _parts(a), _parts(b)
    pairs = [(x, y) for i, x in enumerate(parts_of_a) for j, y in enumerate(parts_of_b) if i + j < 3]
    if len(parts_of_a) > 1 and len(parts_of_b) > 1:  # one product of all parts side by side, along the axis that is summed over
        names = axes.split("->")[0].split(",")
        (summed,) = set(names[0]) & set(names[1])
        a, b = (jnp.concatenate(parts, axis=name.index(summed)) for parts, name in zip(zip(*reversed(pairs)), names))
        return jnp.einsum(axes, a, b, preferred_element_type=out_dtype)
    return sum(jnp.einsum(axes, x, y, preferred_element_type=jnp.float32) for x, y in reversed(pairs)).astype(out_dtype)


def _parts(x):
    if x.dtype == jnp.bfloat16:
        return [x]
    found = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # a pair of casts the compiler may leave out
        found.append(part.astype(jnp.bfloat16))
        x = x - part
    return found
