"""The weight products of the model: y = x wᵀ, dense and grouped by expert.

Weights lie [out, in], as in Hugging Face checkpoints and in the kernels' `b [N, K]`; leading axes are parts of the output ([2, F, D]:
gate and up). A weight is a float32 master, cast or quantised where it is used, whose gradient comes out in float32, never rounded to the
compute dtype; or `Quantized` blocks, as FP8 checkpoints have it, which is frozen; or a master with what products read of it at hand, a
`CastWeight` or an `FP8Weight`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.precision import fp8
from dsv3_jax.precision.grouped import grouped_matmul
from dsv3_jax.precision.products import einsum
from dsv3_jax.precision.recipe import FLOAT32, Recipe, Scales
from dsv3_jax.precision.tap import Tap, given, weight_gradient
from dsv3_jax.precision.weights import CastWeight, FP8Weight
from pallas_kernels import Quantized, quantize_blocks, swiglu_gradient

Weight = jax.Array | Quantized | CastWeight | FP8Weight
_FLOAT_SCALES = Scales()


def linear(
    x: jax.Array,
    w: Weight,
    tap: Tap | None = None,
    recipe: Recipe = FLOAT32,
    out_dtype: Any = None,
    *,
    scales: Scales = _FLOAT_SCALES,
    overflow: jax.Array | None = None,
) -> jax.Array:
    """x [..., K] times wᵀ, w [..., N, K], to [..., N] (all of w's leading axes in N), accumulated in float32.

    out_dtype: the compute dtype by default. scales, overflow: of FP8 products (see `recipe`, `overflow_counters`).
    """
    y_TN = _linear(x.reshape(-1, x.shape[-1]), w, None, tap, recipe, scales, overflow, out_dtype or recipe.compute_dtype)
    return y_TN.reshape(*x.shape[:-1], -1)


def grouped_linear(
    x_RK: jax.Array | fp8.Activation,
    w_ENK: Weight,
    group_sizes_E: jax.Array,
    tap: Tap | None = None,
    recipe: Recipe = FLOAT32,
    *,
    scales: Scales = _FLOAT_SCALES,
    overflow: jax.Array | None = None,
) -> jax.Array:
    """Rows sorted by expert, each times its own expert's weight: [R, K] x [E, ..., N, K] -> [R, N] in the compute dtype.

    x may be quantised already (`quantise`). group_sizes_E: int32, rows of each expert in order; rows past their sum give zeros.
    """
    return _linear(x_RK, w_ENK, group_sizes_E, tap, recipe, scales, overflow, recipe.compute_dtype)


def swiglu_linear(
    gate_up: jax.Array,
    w: Weight,
    group_sizes_E: jax.Array | None = None,
    row_weights: jax.Array | None = None,
    tap: Tap | None = None,
    recipe: Recipe = FLOAT32,
    *,
    scales: Scales = _FLOAT_SCALES,
    overflow: jax.Array | None = None,
) -> jax.Array:
    """silu(gate) · up, times a weight for each row, times wᵀ: the second half of a SwiGLU network, dense or grouped.

    gate_up [..., 2F], gate first (grouped: [R, 2F]); row_weights float32 [R] or None; w [N, F] or [E, N, F] -> [..., N].
    """
    gate_up_T = gate_up.reshape(-1, gate_up.shape[-1])
    if recipe.fp8:
        spec, fp8_weight = _fp8_operands(w, group_sizes_E, recipe, scales, recipe.compute_dtype)
        y_TN = fp8.swiglu_product(spec, gate_up_T, row_weights, fp8_weight, group_sizes_E, tap, overflow)
    else:
        hidden = checkpoint_name(silu_gate(checkpoint_name(gate_up_T, "gate_up"), row_weights), "hidden")
        y_TN = _linear(hidden, w, group_sizes_E, tap, recipe, scales, overflow, recipe.compute_dtype)
    return y_TN.reshape(*gate_up.shape[:-1], -1)


@jax.custom_vjp
def silu_gate(gate_up: jax.Array, row_weights: jax.Array | None = None) -> jax.Array:
    """silu(gate) · up (· the row's weight) in float32. gate_up [T, 2F], gate first; row_weights [T] -> [T, F] in its dtype."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    hidden = jax.nn.silu(gate) * up
    return (hidden if row_weights is None else hidden * row_weights[..., None]).astype(gate_up.dtype)


def _silu_gate_bwd(saved, d_hidden):
    gate_up, row_weights = saved
    return swiglu_gradient(gate_up, d_hidden, row_weights)


silu_gate.defvjp(lambda gate_up, row_weights=None: (silu_gate(gate_up, row_weights), (gate_up, row_weights)), _silu_gate_bwd)


def _linear(x_TK, w, group_sizes_E, tap, recipe, scales, overflow, out_dtype):
    if recipe.fp8:
        spec, fp8_weight = _fp8_operands(w, group_sizes_E, recipe, scales, out_dtype)
        if not isinstance(x_TK, fp8.Activation):
            x_TK = fp8.quantise(x_TK.astype(recipe.compute_dtype), recipe, scales.input)
        return fp8.product(spec, x_TK, fp8_weight, group_sizes_E, tap, overflow)
    w = w if isinstance(w, CastWeight) else CastWeight.of(w, recipe.compute_dtype)
    return _product(_operand(x_TK, recipe), w, group_sizes_E, tap, recipe, out_dtype, _shape(w.master))


def _fp8_operands(w, group_sizes_E, recipe, scales, out_dtype):
    """The static description of an FP8 product and its weight, quantised here if that has not been done before."""
    shape = w.master.shape if isinstance(w, FP8Weight) else w.shape
    *parts, width, _ = shape if group_sizes_E is None else shape[1:]
    parts = parts[0] if parts else 1
    if isinstance(w, Quantized):
        w = FP8Weight.of(w, parts)
    elif not isinstance(w, FP8Weight):
        w = FP8Weight.of(quantize_blocks(jax.lax.stop_gradient(w)), parts)._replace(master=w)
    return fp8.Product(recipe, scales, parts, width, _shape(w.master), out_dtype), w


def _shape(master):
    """Static, so that a product need not keep the array for its backward pass."""
    return None if master is None else jax.ShapeDtypeStruct(master.shape, master.dtype)


def _operand(x, recipe):
    """In the compute dtype; what is in bfloat16 is a part already where a product goes in parts."""
    return x if recipe.in_parts and x.dtype == jnp.bfloat16 else x.astype(recipe.compute_dtype)


def _multiply(x_TK, w, group_sizes_E, recipe, out_dtype, *, transposed=True):
    """x wᵀ, or x w if not transposed; all leading axes of w (but the experts') belong to its rows."""
    w = _operand(w, recipe)
    if group_sizes_E is None:
        axes, w = "tk,nk->tn" if transposed else "tk,kn->tn", w.reshape(-1, w.shape[-1])
        with jax.named_scope("dense_product"):
            return einsum(axes, x_TK, w, recipe, out_dtype)
    w = w.reshape(w.shape[0], -1, w.shape[-1])
    with jax.named_scope("grouped_product"):
        return grouped_matmul(x_TK, w, group_sizes_E, recipe, transposed=transposed).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _product(x_TK, w, group_sizes_E, tap, recipe, out_dtype, master):
    return _multiply(x_TK, w.values, group_sizes_E, recipe, out_dtype)


def _product_fwd(x_TK, w, group_sizes_E, tap, recipe, out_dtype, master):
    return _multiply(x_TK, w.values, group_sizes_E, recipe, out_dtype), (x_TK, w.values, group_sizes_E, given(tap))


def _product_bwd(recipe, out_dtype, master, saved, dy_TN):
    x_TK, w, group_sizes_E, tapped = saved
    dy_TN = dy_TN.astype(recipe.compute_dtype)
    dx_TK = _multiply(dy_TN, w, group_sizes_E, recipe, x_TK.dtype, transposed=False)
    stash = Tap(x_TK if tapped is None else x_TK.astype(recipe.compute_dtype), dy_TN)
    if master is None:
        return dx_TK, None, None, None if tapped is None else stash
    if tapped is not None:
        return dx_TK, CastWeight(None, jnp.zeros(master.shape, master.dtype)), None, stash
    dw = weight_gradient(stash, master.shape, group_sizes_E, recipe).astype(master.dtype)
    return dx_TK, CastWeight(None, dw), None, None


_product.defvjp(_product_fwd, _product_bwd)
