"""The FP8 linear (report §3.3): Fprop, Dgrad and Wgrad on e4m3 operands, dense and grouped by expert.

Inputs and output gradients are quantised in tiles of 128 values of a token, weights in blocks of 128x128; Wgrad contracts over tokens, so
its operands are quantised again in tiles of 128 tokens. What is kept for the backward pass is e4m3: the input of a linear, or the input of
the SwiGLU before it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.precision.recipe import Recipe, Scales
from dsv3_jax.precision.tap import Tap, given, padded_width, weight_gradient
from dsv3_jax.precision.weights import FP8Weight
from pallas_kernels import (
    Quantized,
    fp8_matmul,
    grouped_fp8_matmul,
    quantize_both,
    quantize_tiles,
    requantize_transposed,
    swiglu_backward,
    swiglu_quantize,
    swiglu_quantize_both,
)

# The floor of the scales of gradients. That of activations, max(amax, 1e-4) / 448, lies above the gradient of a mean over many tokens (a
# batch of 60 million would give zeros).
GRADIENT_FLOOR = 1e-4 * 2.0**-40
_CASTS = "casts_and_transposes"  # scope of operations, for profiles


class Activation(NamedTuple):
    """Rows that are already quantised, on their way to a product (through a dispatch, say).

    quantised: Quantized tiles [T, K], what the product reads. gradient: zeros [T, K] in the compute dtype that nothing reads; the
    product's input gradient is their cotangent (that of e4m3 values would itself be e4m3).
    """

    quantised: Quantized
    gradient: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.quantised.shape


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def quantise(x_TK: jax.Array, recipe: Recipe, pow2: bool = False) -> Activation:
    """x [T, K] as an FP8 product reads it; its gradient passes through unchanged."""
    with jax.named_scope(_CASTS):
        return Activation(quantize_tiles(x_TK, pow2=pow2, implementation=recipe.fp8), jnp.zeros_like(x_TK))


quantise.defvjp(lambda x, recipe, pow2: (quantise(x, recipe, pow2), None), lambda recipe, pow2, _, d: (d.gradient,))


def keep(tree: Any, name: str) -> Any:
    """`checkpoint_name` of every array, right for e4m3 too.

    `jax.checkpoint` puts what a policy saves through `reduce_precision`, which takes the codes of e4m3fn beyond 240 for infinities.
    """

    def named(x):
        if x.dtype != jnp.float8_e4m3fn:
            return checkpoint_name(x, name)
        return jax.lax.bitcast_convert_type(checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint8), name), x.dtype)

    return jax.tree.map(named, tree)


class Product(NamedTuple):
    """What is static about a product. parts, width: the weight's [P, N, K] (one part: [N, K]); master: what takes the gradient, or None."""

    recipe: Recipe
    scales: Scales
    parts: int
    width: int
    master: jax.ShapeDtypeStruct | None
    out_dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: Product, x: Activation, w: FP8Weight, group_sizes_E, tap, overflow) -> jax.Array:
    """x [T, K] times wᵀ -> [T, P·N]; grouped when group sizes are given."""
    return _fprop(spec, x.quantised, w, group_sizes_E)


def _product_fwd(spec, x, w, group_sizes_E, tap, overflow):
    saved = x.quantised, w.transposed, group_sizes_E, given(tap), given(overflow)
    return _fprop(spec, x.quantised, w, group_sizes_E), saved


def _product_bwd(spec, saved, dy_TN):
    x, w_KN, group_sizes_E, tapped, counted = saved
    dx_TK, dy_NT, dy_bad = _dgrad(spec, w_KN, group_sizes_E, dy_TN)
    with jax.named_scope(_CASTS):
        x_KT = requantize_transposed(x, group_sizes_E, pow2=spec.scales.input, implementation=spec.recipe.fp8)
    dw, tap = _wgrad(spec, group_sizes_E, Tap(x_KT, dy_NT), tapped)
    return Activation(None, dx_TK), dw, None, tap, jnp.stack([_bad_tiles(x), dy_bad]) if counted is not None else None


product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu_product(spec: Product, gate_up: jax.Array, row_weights, w: FP8Weight, group_sizes_E, tap, overflow) -> jax.Array:
    """silu(gate) · up · row weight, quantised, times wᵀ. gate_up [T, 2F], gate first; row_weights float32 [T] or None -> [T, N].

    A row weight goes into the scales of its row. The backward pass starts from gate_up kept in FP8 (report §3.3.3).
    """
    with jax.named_scope(_CASTS):
        hidden = swiglu_quantize(gate_up, implementation=spec.recipe.fp8)
    return _fprop(spec, _weighted(hidden, row_weights), w, group_sizes_E)


def _swiglu_product_fwd(spec, gate_up, row_weights, w, group_sizes_E, tap, overflow):
    with jax.named_scope(_CASTS):
        hidden, kept = swiglu_quantize_both(gate_up, implementation=spec.recipe.fp8)
    saved = keep(kept, "gate_up"), row_weights, w.transposed, group_sizes_E, given(tap), given(overflow)
    return _fprop(spec, _weighted(hidden, row_weights), w, group_sizes_E), saved


def _swiglu_product_bwd(spec, saved, dy_TN):
    kept, row_weights, w_KN, group_sizes_E, tapped, counted = saved
    d_hidden, dy_NT, dy_bad = _dgrad(spec, w_KN, group_sizes_E, dy_TN)
    with jax.named_scope(_CASTS):
        options = {"implementation": spec.recipe.fp8}
        d_gate_up, hidden_FT, d_row_weights = swiglu_backward(kept, d_hidden, row_weights, group_sizes_E, **options)
    dw, tap = _wgrad(spec, group_sizes_E, Tap(hidden_FT, dy_NT), tapped)
    return d_gate_up, d_row_weights, dw, None, tap, jnp.stack([_bad_tiles(hidden_FT), dy_bad]) if counted is not None else None


swiglu_product.defvjp(_swiglu_product_fwd, _swiglu_product_bwd)


def _weighted(hidden, row_weights):
    if row_weights is None:
        return hidden
    return Quantized.tiles(hidden.values, hidden.scales() * row_weights[:, None])


def _fprop(spec, x, w, group_sizes_E):
    y = _multiply(spec, x, w.forward, group_sizes_E, spec.out_dtype)
    if y.shape[-1] == spec.parts * spec.width:
        return y
    return y.reshape(-1, spec.parts, y.shape[-1] // spec.parts)[..., : spec.width].reshape(-1, spec.parts * spec.width)


def _dgrad(spec, w_KN, group_sizes_E, dy_TN):
    """The input gradient [T, K], the output gradient tiled along tokens [N', T'], and how many of its tiles are not finite."""
    dy_TN = dy_TN.astype(spec.recipe.compute_dtype)
    if room := padded_width(spec.parts, spec.width) // spec.parts - spec.width:
        dy_TN = jnp.pad(dy_TN.reshape(-1, spec.parts, spec.width), [(0, 0), (0, 0), (0, room)]).reshape(dy_TN.shape[0], -1)
    with jax.named_scope(_CASTS):
        options = {"pow2": spec.scales.gradient, "floor": GRADIENT_FLOOR, "implementation": spec.recipe.fp8}
        dy, dy_NT = quantize_both(dy_TN, group_sizes_E, **options)
    return _multiply(spec, dy, w_KN, group_sizes_E, spec.recipe.compute_dtype), dy_NT, _bad_tiles(dy)


def _wgrad(spec, group_sizes_E, operands, tapped):
    """(the cotangent of the weight, that of the tap)."""
    tap = None if tapped is None else operands
    if spec.master is None:
        return None, tap
    if tapped is not None:
        dw = jnp.zeros(spec.master.shape, spec.master.dtype)
    else:
        dw = weight_gradient(operands, spec.master.shape, group_sizes_E, spec.recipe).astype(spec.master.dtype)
    return FP8Weight(None, None, dw), tap


def _multiply(spec, a, b, group_sizes_E, out_dtype):
    options = {"out_dtype": out_dtype, "num_sms": spec.recipe.num_sms, "implementation": spec.recipe.fp8}
    with jax.named_scope("dense_product" if group_sizes_E is None else "grouped_product"):
        return fp8_matmul(a, b, **options) if group_sizes_E is None else grouped_fp8_matmul(a, b, group_sizes_E, **options)


def _bad_tiles(q: Quantized) -> jax.Array:
    """Tiles that hold a NaN or an infinity: their scale is one too."""
    return jnp.sum(~jnp.isfinite(q.stored_scales), dtype=jnp.float32)
