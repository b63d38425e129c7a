"""Weights kept in FP8 inside a parameter dict.

Beside an unquantised leaf there may be its FP8 form: `name` [..., N, K] float8_e4m3fn and `name_scale` float32
[..., ceil(N/128), ceil(K/128)], value = code · scale, as released checkpoints have them (`weight`, `weight_scale_inv`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.precision.recipe import FP8_WEIGHTS
from pallas_kernels import Quantized, quantize_blocks

SCALE = "_scale"


def dense(w: jax.Array | Quantized, dtype: Any) -> jax.Array:
    """The weight as an unquantised product takes it: a master as it is, FP8 blocks as code · scale (in float32) in `dtype`, frozen."""
    return jax.lax.stop_gradient(w.dequantize(dtype)) if isinstance(w, Quantized) else w


def to_fp8(params: Mapping) -> dict:
    """The parameters with every weight of FP8_WEIGHTS as e4m3 and scales, in the released format.

    `jax.eval_shape(to_fp8, decoder.abstract_params())` gives the shapes and dtypes of an FP8 checkpoint, nothing allocated.
    """

    def convert(name, w):
        q = quantize_blocks(w)
        return {name: q.values, name + SCALE: q.scales()}

    return _convert(params, convert)


def fp8_axes(axes: Mapping) -> dict:
    """The logical axis names of `to_fp8(params)` from those of `params`: a scale has its weight's, with 128 values to an entry."""
    return _convert(axes, lambda name, names: {name: names, name + SCALE: names})


def from_fp8(params: Mapping, dtype: Any = jnp.float32) -> dict:
    """The inverse of `to_fp8`: every weight kept in FP8 becomes code · scale in `dtype`; other leaves stay as they are."""

    def walk(tree):
        made = {}
        for name, leaf in tree.items():
            if isinstance(leaf, Mapping):
                made[name] = walk(leaf)
            elif name + SCALE in tree:
                made[name] = Quantized.blocks(leaf, tree[name + SCALE]).dequantize(dtype)
            elif not name.endswith(SCALE):
                made[name] = leaf
        return made

    return walk(params)


def _convert(tree: Mapping, convert: Callable[[str, Any], dict]) -> dict:
    made = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            made[name] = _convert(leaf, convert)
        else:
            made |= convert(name, leaf) if name in FP8_WEIGHTS else {name: leaf}
    return made
