"""A model as a Hugging Face checkpoint: shards, index, config.json, generation_config.json, tokenizer. One tensor on the host at a time."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.hub import config_json
from dsv3_jax.hub.names import SCALE, Tensor, stored_dtype, tensors, tensors_of
from dsv3_jax.hub.safetensors_io import INDEX, SINGLE, Writer
from pallas_kernels import Quantized, quantize_blocks

_SHARD_BYTES = 5 * 10**9
PRECISIONS = ("float32", "bfloat16", "fp8")


def save(model: Any, directory: str | Path, *, precision: str = "bfloat16") -> None:
    """Writes `model` (with .config, .params, .tokenizer) into `directory`, which is new or empty, as transformers and vLLM read it.

    precision: "float32", "bfloat16", or "fp8" as released: 128x128 blocks with scales amax / 448; weights that the model holds in FP8
    keep their codes and scales. MTP layer, tokenizer and chat template included. An interrupted save has no config.json.
    Raises UserError where the directory is not empty or cannot be written, or a parameter is missing or wrongly shaped.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r} is not known: choose one of {', '.join(PRECISIONS)}")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not an empty directory: give a new one to save into")
    try:
        save_weights(model.config, model.params, directory, precision)
        if model.tokenizer is not None:
            model.tokenizer.save(directory)
        generation = {"_from_model_config": True, "bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
        _write_json(directory / "generation_config.json", {name: value for name, value in generation.items() if value is not None})
        _write_json(directory / "config.json", config_json.render(model.config, precision))  # last: without it nothing loads
    except OSError as error:
        raise UserError(f"cannot write into {directory} ({error.strerror}): make room or rights there and give a new directory") from error


def save_weights(config: ModelConfig, params: dict, directory: Path, precision: str) -> None:
    """The safetensors files. A parameter is anything with shape and dtype whose slices `np.asarray` reads, such as a jax.Array."""
    parts = tensors_of(config)
    leaves = {part.path: _leaf(params, part) for part in parts}
    listed = tensors(config, precision=precision)
    shards = _shards(parts, listed)
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        names = [name for part in shard for name in (part.name, part.name + SCALE) if name in listed]
        files |= dict.fromkeys(names, file)
        with Writer(directory / file, {name: listed[name] for name in names}) as writer:
            for part in shard:
                for name, value in _converted(part, *leaves[part.path], precision):
                    writer.write(name, np.asarray(value))
    if len(shards) > 1:
        total = sum(_size(entry) for entry in listed.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})


def _leaf(params: dict, part: Tensor) -> tuple[Any, Any]:
    """The parameter that a tensor is part of, and its scales or None."""
    tree = params
    for key in part.path[:-1]:
        tree = tree.get(key, {})
    leaf = tree.get(part.path[-1])
    if leaf is None or tuple(leaf.shape[len(part.index) :]) != part.shape:
        found = "missing" if leaf is None else f"{list(leaf.shape)}, not [..., {', '.join(map(str, part.shape))}]"
        raise UserError(f"parameter {'/'.join(part.path)} is {found}: save a model with parameters of its own config")
    return leaf, tree.get(part.path[-1] + "_scale")


def _shards(parts: list[Tensor], listed: dict) -> list[list[Tensor]]:
    """Tensors in order, cut where a file would grow over `_SHARD_BYTES`."""
    sizes = [_size(listed[part.name]) + _size(listed.get(part.name + SCALE, ((0,), np.dtype(np.uint8)))) for part in parts]
    shards, room = [], 0
    for part, size in zip(parts, sizes):
        if size > room:
            shards.append([])
            room = max(_SHARD_BYTES, size)
        shards[-1].append(part)
        room -= size
    return shards


def _size(entry: tuple[tuple[int, ...], np.dtype]) -> int:
    return entry[1].itemsize * int(np.prod(entry[0]))


def _converted(part: Tensor, leaf: Any, scales: Any, precision: str):
    """(name, value) of a tensor, and of its scales in FP8."""
    value = jnp.asarray(leaf[part.index])
    quantised = None if scales is None else Quantized.blocks(value, jnp.asarray(scales[part.index]))
    if part.fp8 and precision == "fp8":
        quantised = quantised or quantize_blocks(value)
        yield part.name, quantised.values
        yield part.name + SCALE, quantised.scales()
    else:
        dtype = stored_dtype(part, precision)
        yield part.name, value.astype(dtype) if quantised is None else quantised.dequantize(dtype)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
