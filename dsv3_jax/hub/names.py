"""Which Hugging Face tensor is which slice of which parameter: the one definition, for loading, saving and listing.

A released checkpoint has a tensor a layer, an expert and a projection; the model has them stacked (`moe_layers/mlp/experts/gate_up_proj`
is [L, E, 2, F, D]). The MTP module is layer number `num_hidden_layers`, with copies of embedding and head.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.precision import FP8_WEIGHTS
from pallas_kernels.quantized import BLOCK, num_blocks

PRECISIONS = ("float32", "bfloat16", "fp8")
SCALE = "_scale_inv"  # what Hugging Face appends to the name of an FP8 weight for its scales; the parameter's are `name_scale`


class Tensor(NamedTuple):
    """A tensor of a checkpoint: `parameter[path][index]` is what the file holds under `name`.

    fp8: whether the released format keeps it in FP8. float32: whether it is float32 in every format (the router's selection bias).
    copy: another name of a parameter that is stored elsewhere too (the MTP module's embedding and head).
    """

    name: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    fp8: bool = False
    float32: bool = False
    copy: bool = False


def tensors_of(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint of this model but the scales, in the order of the layers."""
    params = Decoder(config).abstract_params()
    found = list(_top("model.embed_tokens.weight", "embed", params))
    for stack, first_layer in (("dense_layers", 0), ("moe_layers", config.first_k_dense_replace)):
        if stack in params:
            num_layers = params[stack]["input_layernorm"].shape[0]
            for i in range(num_layers):
                found += _layer(f"model.layers.{first_layer + i}", (stack,), (i,), params[stack])
    found += _top("model.norm.weight", "final_norm", params)
    found += _top("lm_head.weight", "lm_head", params)
    if "mtp" in params:
        found += _mtp(f"model.layers.{config.num_hidden_layers}", params)
    return found


def tensors(config: ModelConfig, *, precision: str = "fp8") -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of a whole checkpoint in "fp8" (as released), "bfloat16" or "float32". Nothing is allocated.

    Raises UserError for another precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r} is not known: choose one of {', '.join(PRECISIONS)}")
    listed = {}
    for tensor in tensors_of(config):
        listed[tensor.name] = (tensor.shape, stored_dtype(tensor, precision))
        if tensor.fp8 and precision == "fp8":
            listed[tensor.name + SCALE] = (scale_shape(tensor.shape), np.dtype(np.float32))
    return listed


def stored_dtype(tensor: Tensor, precision: str) -> np.dtype:
    """The dtype of a tensor in a checkpoint of that precision."""
    if tensor.float32 or precision == "float32":
        return np.dtype(np.float32)
    return np.dtype(jnp.float8_e4m3fn if tensor.fp8 and precision == "fp8" else jnp.bfloat16)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of an FP8 weight [..., N, K]: one for every 128x128 block."""
    return (*shape[:-2], num_blocks(shape[-2]), num_blocks(shape[-1]))


def block_of_rows_and_columns(rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """Which row and column of its scales each of these rows and columns of a weight belongs to."""
    return np.arange(rows.start, rows.stop) // BLOCK, np.arange(columns.start, columns.stop) // BLOCK


def _top(name: str, parameter: str, params: dict, **flags) -> Iterator[Tensor]:
    yield Tensor(name, (parameter,), (), params[parameter].shape, **flags)


def _mtp(prefix: str, params: dict) -> Iterator[Tensor]:
    yield from _top(f"{prefix}.embed_tokens.weight", "embed", params, copy=True)
    for parameter, name in (("enorm", "enorm"), ("hnorm", "hnorm"), ("eh_proj", "eh_proj"), ("norm", "shared_head.norm")):
        yield Tensor(f"{prefix}.{name}.weight", ("mtp", parameter), (), params["mtp"][parameter].shape)
    yield from _layer(prefix, ("mtp", "layer"), (), params["mtp"]["layer"])
    yield from _top(f"{prefix}.shared_head.head.weight", "lm_head", params, copy=True)


def _layer(prefix: str, path: tuple[str, ...], index: tuple[int, ...], params: dict) -> Iterator[Tensor]:
    """The tensors of one layer; `index` takes it out of its stack."""
    for key_path, leaf in jax.tree.leaves_with_path(params):
        keys = tuple(key.key for key in key_path)
        yield from _parts(prefix, keys, path + keys, index, leaf.shape[len(index) :])


def _parts(name: str, keys: tuple[str, ...], path: tuple[str, ...], index: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The tensors of one parameter: its experts apart, gate and up apart."""
    first, *rest = keys
    if first == "experts":
        for e in range(shape[0]):
            yield from _parts(f"{name}.experts.{e}", tuple(rest), path, (*index, e), shape[1:])
    elif rest:
        yield from _parts(f"{name}.{first}", tuple(rest), path, index, shape)
    elif first == "gate_up_proj":
        for i, part in enumerate(("gate_proj", "up_proj")):
            yield Tensor(f"{name}.{part}.weight", path, (*index, i), shape[1:], fp8=first in FP8_WEIGHTS)
    elif first == "e_score_correction_bias":
        yield Tensor(f"{name}.{first}", path, index, shape, float32=True)
    elif first == "weight":  # of the router
        yield Tensor(f"{name}.{first}", path, index, shape)
    else:
        yield Tensor(f"{name}.{first}.weight", path, index, shape, fp8=first in FP8_WEIGHTS)
