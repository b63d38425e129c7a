"""A model as a Hugging Face checkpoint: shards, index, config.json, generation_config.json, tokenizer.

Tensors are made and written one at a time; nothing is held but the parameter they are parts of (small ones come together).
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.hub import config_json
from dsv3_jax.hub.names import SCALE, Tensor, stored_dtype, tensors, tensors_of
from dsv3_jax.hub.safetensors_io import INDEX, SINGLE, Writer
from dsv3_jax.precision.weights import SCALE as PARAMETER_SCALE
from pallas_kernels import Quantized, quantize_blocks

_SHARD_BYTES = 5 * 10**9
_READ_BYTES = 10**9  # of parameters read together


def save(model: Any, directory: str | Path, *, precision: str = "bfloat16") -> None:
    """Writes `model` (with .config, .params, .tokenizer) into `directory`, which is new or empty, as transformers and vLLM read it.

    precision: "float32", "bfloat16", or "fp8" as released: 128x128 blocks with scales amax / 448; weights that the model holds in FP8
    keep their codes and scales. MTP layer, tokenizer and chat template included. An interrupted save has no config.json.
    Raises UserError where the directory is not empty or cannot be written, or a parameter is missing, wrongly
    shaped or spread over several processes.
    """
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(model.params)):
        raise UserError(
            "these parameters lie on several processes: save a run's checkpoint and convert it with python -m dsv3_jax.hub to-hf"
        )
    read = lambda paths: {path: _at(model.params, path) for path in paths}  # noqa: E731
    write(model.config, model.params, read, model.tokenizer, Path(directory), precision)


def write(config: ModelConfig, shapes: dict, read: Callable[[list], dict], tokenizer: Any, directory: Path, precision: str) -> None:
    """`save` for parameters that are read a few at a time: `read(paths)` gives arrays by path, as `shapes` has them."""
    listed = tensors(config, precision=precision)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not an empty directory: give a new one to save into")
    parts = tensors_of(config)
    for part in parts:
        leaf = _at(shapes, part.path)
        if leaf is None or tuple(leaf.shape[len(part.index) :]) != part.shape:
            found = "missing" if leaf is None else f"{list(leaf.shape)}, not [..., {', '.join(map(str, part.shape))}]"
            raise UserError(f"parameter {'/'.join(part.path)} is {found}: save a model with parameters of its own config")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_tensors(parts, listed, shapes, read, directory, precision)
        if tokenizer is not None:
            tokenizer.save(directory)
        generation = {"_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        _write_json(directory / "generation_config.json", {name: value for name, value in generation.items() if value is not None})
        _write_json(directory / "config.json", config_json.render(config, precision))  # last: without it nothing loads
    except OSError as error:
        raise UserError(f"cannot write into {directory} ({error.strerror}): make room or rights there and give a new directory") from error


def _write_tensors(parts: list[Tensor], listed: dict, shapes: dict, read: Callable, directory: Path, precision: str) -> None:
    """All files at once, parameter by parameter: a stacked parameter has its parts in many files, and is read once."""
    stored = lambda part: sum(_size(listed[name]) for name in (part.name, part.name + SCALE) if name in listed)  # noqa: E731
    shards, file_of, writers = _filled(parts, stored, _SHARD_BYTES), {}, {}
    with contextlib.ExitStack() as stack:
        for number, shard in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            names = [name for part in shard for name in (part.name, part.name + SCALE) if name in listed]
            file_of |= dict.fromkeys(names, file)
            writers[file] = stack.enter_context(Writer(directory / file, {name: listed[name] for name in names}))
        by_path: dict[tuple[str, ...], list[Tensor]] = {}
        for part in parts:
            by_path.setdefault(part.path, []).append(part)
        held = lambda path: _at(shapes, path).size * _at(shapes, path).dtype.itemsize  # noqa: E731
        for paths in _filled(by_path, held, _READ_BYTES):  # small parameters are read together
            leaves = read([at for path in paths for at in (path, _scale_path(path)) if _at(shapes, at) is not None])
            for path in paths:
                for part in by_path[path]:
                    for name, value in _converted(part, leaves[path], leaves.get(_scale_path(path)), precision):
                        writers[file_of[name]].write(name, np.asarray(value))
            del leaves  # before the next ones are read
    if len(shards) > 1:
        total = sum(_size(entry) for entry in listed.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))})


def _filled(items: Iterable, size: Callable[[Any], int], most: int) -> list[list]:
    """Items in order, divided into lists of at most `most` bytes; what is larger by itself has a list of its own."""
    lists, room = [], 0
    for item in items:
        if size(item) > room:
            lists.append([])
            room = max(most, size(item))
        lists[-1].append(item)
        room -= size(item)
    return lists


def _scale_path(path: tuple[str, ...]) -> tuple[str, ...]:
    return (*path[:-1], path[-1] + PARAMETER_SCALE)


def _at(tree: dict, path: tuple[str, ...]) -> Any:
    """What lies at a path of a nested dict, or None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


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
