"""Parameters as decoding reads them: every weight an array of its own, in the format it is multiplied in.

A kernel cannot read a slice of a stack in place: XLA would copy every weight of every layer in every step, three times the bytes
that a decode step is made of. So stacks are taken apart once, and what a step would compute from weights alone is computed once.
"""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.precision import FP8_WEIGHTS, Recipe
from pallas_kernels import Quantized, quantize_blocks

_SCALE = "_scale"


def decode_params(params: Mapping, config: ModelConfig, recipe: Recipe, *, consume: bool = False) -> dict:
    """Parameters as `Decoder.decode` takes them, from those of `Decoder.init`: each stack becomes a list with a dict for each layer.

    Weights wider than the compute dtype are cast to it, those of FP8 products quantised; the router stays in float32. Attention has,
    beside `kv_b_proj` for prefill, `k_up_proj` [H, N, C] and `v_up_proj` [H, V, C] for the absorbed form, which are never in FP8.
    Stacks may be lists already (`unstacked`), and layers that have those two stay as they are. consume: deletes each weight of a stack
    once it is taken apart, so that no more than one of them is held twice.
    """
    made = {}
    for name, leaf in params.items():
        if isinstance(leaf, list):
            made[name] = [layer if "k_up_proj" in layer["self_attn"] else _converted(layer, config, recipe) for layer in leaf]
        elif name.endswith("_layers"):
            made[name] = [_converted(layer, config, recipe) for layer in _unstacked(leaf, consume)]
        else:
            made |= _converted({name: leaf}, config, recipe)
    return made


def unstacked(leaves: Iterable[tuple[tuple[str, ...], jax.Array]]) -> dict:
    """Parameters from (path, array) as they come, with lists of layers: no more than one stack of weights is held twice, ever."""
    params: dict = {}
    for path, leaf in leaves:
        targets, parts = [params], [leaf]
        if path[0].endswith("_layers"):
            targets, parts = params.setdefault(path[0], [{} for _ in range(leaf.shape[0])]), _unstacked(leaf, consume=True)
            path = path[1:]
        for target, part in zip(targets, parts, strict=True):
            functools.reduce(lambda tree, key: tree.setdefault(key, {}), path[:-1], target)[path[-1]] = part
        del leaf, parts
    return params


def _unstacked(stack, consume):
    """The dicts of a stack's layers."""
    if not isinstance(stack, Mapping):
        parts = _slices(stack)
        if consume and isinstance(stack, jax.Array):
            stack.delete()
        return parts
    leaves = {name: _unstacked(leaf, consume) for name, leaf in stack.items()}
    return [dict(zip(leaves, layer)) for layer in zip(*leaves.values(), strict=True)]


_slices = jax.jit(list)


def _converted(tree, config, recipe):
    made = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            made[name] = leaf if name == "gate" else _converted(leaf, config, recipe)
        elif name + _SCALE in tree or name.endswith(_SCALE):
            made[name] = leaf
        elif recipe.fp8 and name in FP8_WEIGHTS:
            made[name], made[name + _SCALE] = _quantised(leaf)
        else:
            made[name] = _cast(leaf, recipe.compute_dtype)
    if "kv_b_proj" in tree:
        made |= _up_projections(made["kv_b_proj"], made.get("kv_b_proj" + _SCALE), config, recipe)
    return made


@jax.jit
def _quantised(w):
    q = quantize_blocks(w.astype(jnp.float32))
    return q.values, q.scales()


def _cast(leaf, dtype):
    return jnp.asarray(leaf, dtype) if jnp.dtype(dtype).itemsize < leaf.dtype.itemsize else leaf


@functools.partial(jax.jit, static_argnums=(2, 3))
def _up_projections(kv_b, scale, config, recipe):
    if scale is not None:
        kv_b = Quantized.blocks(kv_b, scale).dequantize(recipe.compute_dtype)
    kv_b = kv_b.astype(recipe.compute_dtype).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    return dict(zip(("k_up_proj", "v_up_proj"), jnp.split(kv_b, [config.qk_nope_head_dim], axis=1)))
