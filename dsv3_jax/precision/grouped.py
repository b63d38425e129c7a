"""Unquantised grouped products: the bfloat16 kernels on Hopper, plain JAX elsewhere and in float32; chosen here and nowhere else."""

import jax
import jax.numpy as jnp

from dsv3_jax.precision.recipe import Recipe
from pallas_kernels import grouped_bf16_matmul, grouped_bf16_wgrad
from pallas_kernels.grouped_bf16 import reference


def grouped_matmul(x_RK: jax.Array, w: jax.Array, group_sizes_E: jax.Array, recipe: Recipe, *, transposed: bool = True) -> jax.Array:
    """Rows sorted by group times their group's weight: x wᵀ with w [E, N, K], or x w with w [E, K, N] if not transposed -> [R, N].

    Rows past the last group give zeros.
    """
    if recipe.compute_dtype == jnp.float32:
        return reference.grouped_bf16_matmul(x_RK, w, group_sizes_E, transposed=transposed, precision=recipe.product_precision)
    return grouped_bf16_matmul(x_RK, w, group_sizes_E, transposed=transposed, num_sms=recipe.num_sms)


def grouped_matmul_weight_gradient(x_RK: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array, recipe: Recipe) -> jax.Array:
    """Per group dyᵀ x, float32 [E, N, K]. Rows past the last group must be finite."""
    if recipe.compute_dtype == jnp.float32:
        return reference.grouped_bf16_wgrad(dy_RN, x_RK, group_sizes_E, precision=recipe.product_precision)
    return grouped_bf16_wgrad(dy_RN, x_RK, group_sizes_E, num_sms=recipe.num_sms)
