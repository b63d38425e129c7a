"""Taps split the weight gradient off a product.

Given a tap, a product returns as the tap's "cotangent" the two operands that the weight gradient is made of, and zero for the weight: a
pipeline runs the input-gradient pass first and `weight_gradient` of the stashed operands later, without computing anything twice
(report §3.2.1; DualPipe's WeightGradStore).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.precision.grouped import grouped_matmul_weight_gradient
from dsv3_jax.precision.products import einsum
from dsv3_jax.precision.recipe import FLOAT32, Recipe
from pallas_kernels import Quantized, fp8_wgrad, grouped_fp8_wgrad, quantize_both


class Tap(NamedTuple):
    """Zeros in, the operands of the weight gradient out as their cotangents. Make one with `Tap.zeros`.

    x [T, K] and dy [T, N] in the compute dtype; in FP8 recipes Quantized tiles [K, T'] and [N', T'], tokens last (see `FP8Weight`).
    """

    x: jax.Array | Quantized
    dy: jax.Array | Quantized

    @classmethod
    def zeros(cls, rows: int, w_shape: tuple[int, ...], recipe: Recipe, *, grouped: bool = False) -> "Tap":
        """A tap for a product of `rows` rows with a weight of shape [..., N, K], grouped: [E, ..., N, K]."""
        group_sizes = jax.ShapeDtypeStruct(w_shape[:1], jnp.int32) if grouped else None
        parts, n, k = _parts(w_shape, grouped)

        def operand(width):
            x = jax.ShapeDtypeStruct((rows, width), recipe.compute_dtype)
            if recipe.fp8:
                _, x = jax.eval_shape(lambda x, sizes: quantize_both(x, sizes, implementation="reference"), x, group_sizes)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)

        return cls(operand(k), operand(padded_width(parts, n) if recipe.fp8 else parts * n))


@jax.named_scope("weight_gradient")
def weight_gradient(stash: Tap, w_shape: tuple[int, ...], group_sizes_E: jax.Array | None = None, recipe: Recipe = FLOAT32) -> jax.Array:
    """The gradient of a weight of that shape, float32: dyᵀ x, for each expert when group sizes are given."""
    parts, n, k = _parts(w_shape, group_sizes_E is not None)
    if recipe.fp8:
        options = {"num_sms": recipe.num_sms, "implementation": recipe.fp8}
        if group_sizes_E is None:
            dw = fp8_wgrad(stash.dy, stash.x, **options)
        else:
            dw = grouped_fp8_wgrad(stash.dy, stash.x, group_sizes_E, **options)
        lead = dw.shape[:-2]
        return dw.reshape(*lead, parts, -1, k)[..., :n, :].reshape(w_shape)
    if group_sizes_E is None:
        dw = einsum("tn,tk->nk", stash.dy, stash.x, recipe, jnp.float32)
    else:
        dw = grouped_matmul_weight_gradient(stash.x, stash.dy, group_sizes_E, recipe)
    return dw.reshape(w_shape)


def given(argument) -> tuple | None:
    """Whether there is such an argument, for the residuals of a custom_vjp: a structure without leaves, which stays static."""
    return None if argument is None else ()


def padded_width(parts: int, n: int) -> int:
    """N' of an `FP8Weight`: several parts are padded to multiples of 128 each."""
    return parts * (n if parts == 1 else -(-n // 128) * 128)


def _parts(w_shape, grouped):
    *lead, n, k = w_shape[1:] if grouped else w_shape
    parts = 1
    for size in lead:
        parts *= size
    return parts, n, k
