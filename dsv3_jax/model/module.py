"""How NNX modules define parameters, and how pure dicts of arrays are bound to them.

A module says what its weights are (shape, logical axes, initial values) and what it computes. Parameters live outside, as a pure
nested dict of arrays that goes through `jax.jit`, `lax.scan` and checkpoints; `bind` puts such a dict into a copy of a module.
Beside a weight `name` the dict may hold `name_scale` (the weight is then float8_e4m3fn with 128x128 block scales), and for a training
step `name_form`, `name_overflow` (dsv3_jax.precision.weights) and `name_tap` (dsv3_jax.precision.tap).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.precision import FP8_WEIGHTS, Activation, Recipe, Scales, Weight, grouped_linear, linear, swiglu_linear
from pallas_kernels import Quantized


class Module(nnx.Module):
    """Base of the model's modules. `recipe`: the numeric recipe of its products."""

    recipe: Recipe

    def linear(self, name: str, x: jax.Array) -> jax.Array:
        """x [..., K] times the weight `name` [..., N, K] (leading axes of the weight are merged into N)."""
        return linear(x, self._weight(name), recipe=self.recipe, **self._options(name))

    def grouped_linear(self, name: str, x_RK: jax.Array | Activation, group_sizes_E: jax.Array) -> jax.Array:
        """Rows sorted by expert times the weight `name` [E, ..., N, K]."""
        return grouped_linear(x_RK, self._weight(name), group_sizes_E, recipe=self.recipe, **self._options(name))

    def swiglu_linear(self, name: str, gate_up: jax.Array, group_sizes_E=None, row_weights=None) -> jax.Array:
        """silu(gate) · up (· a weight for each row) times the weight `name` [N, K], or [E, N, K] when group sizes are given."""
        return swiglu_linear(gate_up, self._weight(name), group_sizes_E, row_weights, recipe=self.recipe, **self._options(name))

    def _weight(self, name: str) -> Weight:
        w, scale, form = getattr(self, name)[...], getattr(self, name + "_scale", None), getattr(self, name + "_form", None)
        if form is not None:
            return form._replace(master=w)
        return w if scale is None else Quantized.blocks(w, scale[...])

    def _options(self, name: str) -> dict:
        tap, overflow = getattr(self, name + "_tap", None), getattr(self, name + "_overflow", None)
        return {"tap": tap, "scales": FP8_WEIGHTS.get(name, Scales()), "overflow": overflow}


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> nnx.Param:
    """A float32 weight drawn from a normal distribution, with the logical names of its axes."""
    assert len(shape) == len(axes)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def ones(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """The gain of a norm."""
    return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)


class RouterBias(nnx.Variable):
    """The router's selection bias: saved with the parameters, moved by the load, never by a gradient."""


def init(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> dict:
    """The initial parameters of a module as a pure dict."""
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key))))


def abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """The module with shapes instead of arrays: a template for `bind`."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def shapes(module: nnx.Module) -> dict:
    """The shape and dtype of every parameter of an `abstract` module, in the structure of `init`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(module)))


def logical_axes(module: nnx.Module) -> dict:
    """The logical axis names of every parameter, in the structure of `init`."""
    axes = jax.tree.map(
        lambda variable: variable.get_metadata()["axes"], nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return nnx.to_pure_dict(axes)


def bind(module: Any, params: Mapping) -> Any:
    """A copy of `module` whose weights are `params` (arrays or tracers). Raises KeyError when a weight is missing."""
    bound = nnx.clone(module)
    _assign(bound, params)
    return bound


def _assign(module, params):
    for name, variable in list(vars(module).items()):
        if isinstance(variable, nnx.Variable) and name not in params:
            raise KeyError(f"missing parameter {name!r} of {type(module).__name__}")
    for name, value in params.items():
        if name.endswith(("_tap", "_form", "_overflow")):
            setattr(module, name, nnx.data(value))
        elif isinstance(value, Mapping):
            _assign(getattr(module, name), value)
        else:
            setattr(module, name, nnx.Param(value))


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis: in float32, cast back, then times the gain. x [..., D], gain [D]."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return _scaled(normed.astype(x.dtype), gain)


@jax.custom_vjp
def _scaled(x: jax.Array, gain: jax.Array) -> jax.Array:
    """x times the gain in the dtype of x. The gain's gradient, a sum over all tokens, is summed in float32: autodiff would sum it in that
    dtype, and a Hopper GPU adds bfloat16 as it stands, so that a sum of thousands loses its small half."""
    return x * gain.astype(x.dtype)


def _scaled_forward(x, gain):
    return _scaled(x, gain), (x, gain)


def _scaled_backward(residuals, cotangent):
    x, gain = residuals
    products = cotangent.astype(jnp.float32) * x.astype(jnp.float32)
    return cotangent * gain.astype(x.dtype), jnp.sum(products, axis=tuple(range(x.ndim - 1))).astype(gain.dtype)


_scaled.defvjp(_scaled_forward, _scaled_backward)
