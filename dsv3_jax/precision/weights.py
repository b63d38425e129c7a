"""What products read of weights, beside or instead of their float32 masters in the parameter dict.

Stored: `name` [..., N, K] float8_e4m3fn and `name_scale` float32 [..., ceil(N/128), ceil(K/128)], value = code · scale, as released
checkpoints have them (`weight`, `weight_scale_inv`). Nothing else is kept of such a weight: it is frozen.

Trained: `name` is the float32 master, and `name_form` (a `CastWeight`, or in FP8 products an `FP8Weight`), made from it once a step by
`forms` and attached for that step, is what its products read. The gradient goes to the master as if nothing had been rounded.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.precision.recipe import FP8_WEIGHTS, Recipe
from pallas_kernels import Quantized, quantize_blocks

SCALE, FORM, OVERFLOW = "_scale", "_form", "_overflow"
_BLOCK = 128


class CastWeight(NamedTuple):
    """A weight as unquantised products read it: values [..., N, K]. master: the weight that takes the gradient, if one does."""

    values: jax.Array
    master: jax.Array | None = None

    @classmethod
    def of(cls, w: jax.Array | Quantized, dtype: Any) -> "CastWeight":
        """From an array, its own master; from FP8 blocks, frozen: code · scale (in float32) in `dtype`."""
        return cls(w.dequantize(dtype)) if isinstance(w, Quantized) else cls(w, w)


class FP8Weight(NamedTuple):
    """A weight as FP8 products read it: both operands have their contraction axis last, and the same codes and scales.

    forward [..., N', K] and transposed [..., K, N']: Quantized blocks. N' counts the parts of a weight [P, N, K] (gate and up), each
    padded with zeros to a multiple of 128, so that no block lies in two of them. master: the weight [..., N, K] that takes the
    gradient, if one does.
    """

    forward: Quantized
    transposed: Quantized
    master: jax.Array | None = None

    @classmethod
    def of(cls, w: Quantized, parts: int = 1) -> "FP8Weight":
        """From blocks [..., N, K], or [..., P, N, K] when there are several parts. Codes are moved, never rounded again."""
        values, scales = w.values, w.scales()
        if parts > 1:
            *lead, _, n, k = values.shape
            padding = [(0, 0)] * (values.ndim - 2) + [(0, -n % _BLOCK), (0, 0)]
            values = jnp.pad(values, padding).reshape(*lead, -1, k)
            scales = scales.reshape(*lead, -1, scales.shape[-1])
        swap = lambda x: jnp.swapaxes(x, -1, -2)  # noqa: E731
        return cls(Quantized.blocks(values, scales), Quantized.blocks(swap(values), swap(scales)))


def forms(params: Mapping, recipe: Recipe) -> dict:
    """What to `attach` to the parameters of a step: every float32 weight of FP8_WEIGHTS as the recipe's products read it.

    To be called once a step, outside of the loop over microbatches and of the function that is differentiated:

        forms = precision.forms(params, recipe)
        gradient = jax.grad(lambda params, batch: loss(attach(params, forms), batch))
    """

    def form(name, w):
        if not recipe.fp8:
            return {name + FORM: CastWeight(w.astype(recipe.compute_dtype))}
        parts = w.shape[-3] if name == "gate_up_proj" else 1
        q = jax.lax.optimization_barrier(quantize_blocks(w))  # or XLA transposes what codes are made from, of four bytes, not the codes
        return {name + FORM: FP8Weight.of(q, parts)}

    return _select(params, form)


def overflow_counters(params: Mapping, recipe: Recipe) -> dict:
    """Zeros to `attach`, to all parameters or to those of a layer, and to differentiate by: the "gradient" of `name_overflow` [2], in a
    stack [L, 2], float32 is the number of tiles of the product's input and of its output gradient that hold a NaN or an infinity. Empty
    for recipes without FP8."""
    counters = {}
    for key, stack in params.items() if recipe.fp8 else ():
        if isinstance(stack, Mapping):
            count = jax.tree.leaves(stack)[0].shape[:1] if key.endswith("_layers") else ()
            counters[key] = _select(stack, lambda name, w, count=count: {name + OVERFLOW: jnp.zeros((*count, 2), jnp.float32)})
    return counters


def is_counter(name: str) -> bool:
    """Whether a leaf of that name is one of `overflow_counters`."""
    return name.endswith(OVERFLOW)


def attach(params: Mapping, *extras: Mapping) -> dict:
    """The parameter dict with the leaves of the others added to its sub-dicts, and to those of its lists of layers."""
    merged = dict(params)
    for extra in extras:
        for name, leaf in extra.items():
            if isinstance(leaf, list):
                merged[name] = [attach(*layers) for layers in zip(merged[name], leaf, strict=True)]
            else:
                merged[name] = attach(merged.get(name, {}), leaf) if isinstance(leaf, Mapping) else leaf
    return merged


def detach(params: Mapping, wanted: Callable[[str], bool]) -> tuple[dict, dict]:
    """(everything else, the leaves of wanted names), sub-dicts of `params` each; `attach` puts them together again."""
    rest, found = {}, {}
    for name, leaf in params.items():
        if isinstance(leaf, Mapping):
            rest[name], inner = detach(leaf, wanted)
            if inner:
                found[name] = inner
        else:
            (found if wanted(name) else rest)[name] = leaf
    return rest, found


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
    made = {}
    for name, leaf in params.items():
        if isinstance(leaf, Mapping):
            made[name] = from_fp8(leaf, dtype)
        elif name + SCALE in params:
            made[name] = Quantized.blocks(leaf, params[name + SCALE]).dequantize(dtype)
        elif not name.endswith(SCALE):
            made[name] = leaf
    return made


def has_fp8(params: Any) -> bool:
    """Whether weights are kept in FP8; `params`: arrays or shapes."""
    return any(leaf.dtype == jnp.float8_e4m3fn for leaf in jax.tree.leaves(params))


def _convert(tree: Mapping, convert: Callable[[str, Any], dict]) -> dict:
    """The tree with every FP8 weight replaced by the entries that `convert(name, leaf)` gives."""
    made = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            made[name] = _convert(leaf, convert)
        else:
            made |= convert(name, leaf) if name in FP8_WEIGHTS else {name: leaf}
    return made


def _select(tree: Mapping, entries: Callable[[str, Any], dict]) -> dict:
    """Only what `entries(name, leaf)` gives for the weights of FP8_WEIGHTS that have masters, in their sub-dicts."""
    made = {}
    for name, leaf in tree.items():
        if isinstance(leaf, list):
            made[name] = [_select(layer, entries) for layer in leaf]
        elif isinstance(leaf, Mapping):
            if inner := _select(leaf, entries):
                made[name] = inner
        elif name in FP8_WEIGHTS and name + SCALE not in tree:
            made |= entries(name, leaf)
    return made
