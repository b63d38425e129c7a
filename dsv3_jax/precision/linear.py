"""The two weight products of the model: y = x wᵀ, dense and grouped by expert.

Weights lie [out, in], as in Hugging Face checkpoints and in the kernels' `b [N, K]`; leading axes are parts of the output ([2, F, D]:
gate and up). A weight is a float32 master, cast where it is used, whose gradient comes out in float32, never rounded to the compute
dtype; or `Quantized` blocks, as FP8 checkpoints have it, which is frozen: it gets no gradient.

A `Tap` splits the weight gradient off. Given one, the product returns as the tap's "cotangent" the pair (x, dy) that the weight
gradient is made of, and zero for the weight: a pipeline runs the input-gradient pass first and `weight_gradient` of the stashed pairs
later, without computing anything twice (report §3.2.1; DualPipe's WeightGradStore).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.precision.grouped import grouped_matmul, grouped_matmul_weight_gradient
from dsv3_jax.precision.recipe import FLOAT32, Recipe
from dsv3_jax.precision.weights import dense
from pallas_kernels import Quantized


class Tap(NamedTuple):
    """Zeros in, (x [T, K], dy [T, N]) out as their cotangents. Make one with `Tap.zeros`."""

    x: jax.Array
    dy: jax.Array

    @classmethod
    def zeros(cls, rows: int, w_shape: tuple[int, ...], recipe: Recipe) -> "Tap":
        """A tap for a product of `rows` rows with a weight of shape [N, K] or [E, N, K]."""
        return cls(jnp.zeros((rows, w_shape[-1]), recipe.compute_dtype), jnp.zeros((rows, w_shape[-2]), recipe.compute_dtype))


def linear(x: jax.Array, w: jax.Array | Quantized, tap: Tap | None = None, recipe: Recipe = FLOAT32, out_dtype: Any = None) -> jax.Array:
    """x [..., K] times wᵀ, w [..., N, K], to [..., N] (all of w's leading axes in N), accumulated in float32.

    out_dtype: the compute dtype by default.
    """
    w_NK = dense(w, recipe.compute_dtype).reshape(-1, w.shape[-1])
    x_TK = x.reshape(-1, x.shape[-1]).astype(recipe.compute_dtype)
    y_TN = _product(x_TK, w_NK, None, tap, recipe, out_dtype or recipe.compute_dtype)
    return y_TN.reshape(*x.shape[:-1], -1)


def grouped_linear(
    x_RK: jax.Array, w_ENK: jax.Array | Quantized, group_sizes_E: jax.Array, tap: Tap | None = None, recipe: Recipe = FLOAT32
) -> jax.Array:
    """Rows sorted by expert, each times its own expert's weight: [R, K] x [E, ..., N, K] -> [R, N] in the compute dtype.

    group_sizes_E: int32, rows of each expert in order; rows past their sum give zeros.
    """
    w_ENK = dense(w_ENK, recipe.compute_dtype).reshape(w_ENK.shape[0], -1, w_ENK.shape[-1])
    return _product(x_RK.astype(recipe.compute_dtype), w_ENK, group_sizes_E, tap, recipe, recipe.compute_dtype)


def weight_gradient(stash: Tap, group_sizes_E: jax.Array | None = None, recipe: Recipe = FLOAT32) -> jax.Array:
    """The weight gradient of a product, float32: dyᵀ x [N, K], or [E, N, K] when group sizes are given."""
    precision = recipe.product_precision
    if group_sizes_E is None:
        return jnp.einsum("tn,tk->nk", stash.dy, stash.x, precision=precision, preferred_element_type=jnp.float32)
    return grouped_matmul_weight_gradient(stash.x, stash.dy, group_sizes_E, precision)


def _multiply(x_TK, w, group_sizes_E, recipe, out_dtype):
    w, precision = w.astype(recipe.compute_dtype), recipe.product_precision
    if group_sizes_E is None:
        return jnp.einsum("tk,nk->tn", x_TK, w, precision=precision, preferred_element_type=out_dtype)
    return grouped_matmul(x_TK, w, group_sizes_E, precision).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _product(x_TK, w, group_sizes_E, tap, recipe, out_dtype):
    return _multiply(x_TK, w, group_sizes_E, recipe, out_dtype)


def _product_fwd(x_TK, w, group_sizes_E, tap, recipe, out_dtype):
    return _multiply(x_TK, w, group_sizes_E, recipe, out_dtype), (x_TK, w, group_sizes_E, tap is not None)


def _product_bwd(recipe, out_dtype, saved, dy_TN):
    x_TK, w, group_sizes_E, tapped = saved
    dy_TN = dy_TN.astype(recipe.compute_dtype)
    dx_TK = _multiply(dy_TN, jnp.swapaxes(w, -1, -2), group_sizes_E, recipe, recipe.compute_dtype)
    stash = Tap(x_TK, dy_TN)
    if tapped:
        return dx_TK, jnp.zeros_like(w), None, stash
    return dx_TK, weight_gradient(stash, group_sizes_E, recipe).astype(w.dtype), None, None


_product.defvjp(_product_fwd, _product_bwd)
