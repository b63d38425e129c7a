"""A Hugging Face checkpoint straight onto the devices.

Every process reads only the slices that its devices hold. Slices go to the device in slabs of at most `_SLAB_BYTES` (or one tensor),
where they are converted and put in place, and the next parameter is read meanwhile, so that the host holds the result (where it is the
device) and four slabs.
"""

import functools
import itertools
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.hub import config_json
from dsv3_jax.hub.names import SCALE, Tensor, block_of_rows_and_columns, scale_shape, tensors_of
from dsv3_jax.hub.safetensors_io import Stored, first_few, open_checkpoint
from dsv3_jax.model import Decoder
from dsv3_jax.precision.weights import SCALE as PARAMETER_SCALE
from pallas_kernels.quantized import BLOCK, num_blocks

_SLAB_BYTES = 256 * 2**20
_COMPARED_ROWS = 4096  # of an embedding and its copy at a time
_READERS = 16  # threads; reading is bound by the disk's queue, not by the CPU
_E4M3 = np.dtype(jnp.float8_e4m3fn)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a Hugging Face checkpoint: a run's config.json has other fields, and its folder no safetensors."""
    if any(path.glob("*.safetensors*")):
        return True
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and ("architectures" in values or "model_type" in values)


def load(directory: str | Path, *, shardings: Any = None, dtype: Any = None, weights: str = "stored") -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and parameters of a Hugging Face directory: config.json and model.safetensors or its shards and index.

    shardings: a sharding, or one for each parameter in the structure of `Decoder.logical_axes`; None: the first device.
    dtype: what weights that are not FP8 are cast to; None: as stored. The router's selection bias is always float32.
    weights: "stored" keeps FP8 weights (`name` float8_e4m3fn [..., N, K] and `name_scale` float32 [..., ceil(N/128), ceil(K/128)]);
        "dequantised" makes them `dtype`, or float32, where the product is exact.
    Raises UserError where the directory is not such a checkpoint, a file is cut short, or tensors are missing, unknown or wrongly shaped.
    """
    config, _ = config_json.read(Path(directory))
    params: dict[str, Any] = {}
    for path, leaf in stream(directory, shardings=shardings, dtype=dtype, weights=weights, ahead=1):
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), path[:-1], params)[path[-1]] = leaf
    return config, params


def stream(
    directory: str | Path, *, shardings: Any = None, dtype: Any = None, weights: str = "stored", ahead: int = 0
) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    """What `load` loads, parameter by parameter: (path, array). Everything is checked before the first one is read.

    ahead: how many parameters are read before they are asked for, so that the disk does not wait for what is done with them.
    """
    if weights not in ("stored", "dequantised"):
        raise UserError(f"weights={weights!r} is not known: choose 'stored' or 'dequantised'")
    directory = Path(directory)
    config, _ = config_json.read(directory)
    tensors, stored = tensors_of(config), open_checkpoint(directory)
    check(tensors, stored, directory)
    parts_of: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.copy:
            parts_of.setdefault(tensor.path, []).append(tensor)
    shapes = Decoder(config).abstract_params()
    sources = {path: _sources(parts, stored) for path, parts in parts_of.items()}
    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(ahead + 1) as makers:
        _check_copies([tensor for tensor in tensors if tensor.copy], parts_of, stored, readers)

        def arrays():
            for path, (values, scales) in sources.items():
                shape = functools.reduce(lambda tree, key: tree[key], path, shapes).shape
                sharding = _sharding_of(shardings, path)
                if scales and weights == "stored":
                    yield path, (shape, _E4M3, sharding, values, readers)
                    scale_path, scale_dtype = (*path[:-1], path[-1] + PARAMETER_SCALE), np.dtype(np.float32)
                    yield scale_path, (scale_shape(shape), scale_dtype, scale_sharding(sharding, shape), scales, readers)
                else:
                    first = parts_of[path][0]
                    as_stored = np.dtype(np.float32) if scales else stored[first.name].dtype
                    leaf_dtype = np.dtype(np.float32) if first.float32 else np.dtype(dtype or as_stored)
                    yield path, (shape, leaf_dtype, sharding, values, readers, scales)

        making: deque[tuple[tuple[str, ...], Future]] = deque()
        for path, what in arrays():
            making.append((path, makers.submit(_array, *what)))
            if len(making) > ahead:
                path, made = making.popleft()
                yield path, made.result()
                del made
        while making:
            path, made = making.popleft()
            yield path, made.result()


def check(tensors: list[Tensor], stored: dict[str, Stored], directory: Path) -> None:
    """Raises UserError that names what is missing, unknown or wrongly shaped in a checkpoint that should hold `tensors`."""
    expected: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        expected[tensor.name] = tensor.shape
        if tensor.fp8 and tensor.name in stored and stored[tensor.name].dtype == _E4M3:
            expected[tensor.name + SCALE] = scale_shape(tensor.shape)
    missing = [name for name in expected if name not in stored]
    # Some releases store the rotary frequencies, which follow from the configuration.
    unknown = [name for name in stored if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    shapes = [
        f"{name} is {list(stored[name].shape)} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    found = {"missing": missing, "not of this model": unknown, "wrongly shaped": shapes}
    if any(found.values()):
        problems = "; ".join(f"{len(names)} {what}: {first_few(names)}" for what, names in found.items() if names)
        raise UserError(f"{directory}: its tensors do not fit its config.json ({problems}): download it again or correct config.json")
    if stray := [tensor.name for tensor in tensors if not tensor.fp8 and stored[tensor.name].dtype == _E4M3]:
        raise UserError(f"{directory}: {first_few(stray)} cannot be FP8: store it in bfloat16")


def scale_sharding(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """How the scales of a weight of that shape lie: as the weight, but whole along an axis whose blocks do not divide as it does."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    for axis in (-2, -1):
        names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
        parts = int(np.prod([sharding.mesh.shape[name] for name in names if name is not None]))
        if shape[axis] % (parts * BLOCK):
            spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _sharding_of(shardings: Any, path: tuple[str, ...]) -> Sharding:
    if shardings is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, Sharding):
        return shardings
    return functools.reduce(lambda tree, key: tree[key], path, shardings)


def _sources(parts: list[Tensor], stored: dict[str, Stored]) -> tuple[dict, dict]:
    """Where the values and, of an FP8 weight, the scales of each part of a parameter are: index -> Stored."""
    values = {part.index: stored[part.name] for part in parts}
    scales = {part.index: stored[part.name + SCALE] for part in parts if stored[part.name].dtype == _E4M3}
    if scales and len(scales) != len(parts):
        plain = next(part.name for part in parts if part.index not in scales)
        raise UserError(f"{plain} is not FP8 and others of its kind are: store all layers and experts alike")
    first = stored[parts[0].name].dtype
    if other := [part.name for part in parts if stored[part.name].dtype != first]:
        raise UserError(f"{other[0]} is {stored[other[0]].dtype} and {parts[0].name} is {first}: store all layers and experts alike")
    return values, scales


def _check_copies(copies: list[Tensor], leaves: dict, stored: dict[str, Stored], readers: ThreadPoolExecutor) -> None:
    """The MTP module shares embedding and head: its stored copies must equal them. Each process compares its part of the rows."""

    def differs(copy: Tensor, first_row: int) -> str | None:
        original = stored[leaves[copy.path][0].name]
        rows = slice(first_row, min(first_row + _COMPARED_ROWS, copy.shape[0]))
        both = [np.empty((rows.stop - rows.start, *copy.shape[1:]), source.dtype) for source in (original, stored[copy.name])]
        for source, out in zip((original, stored[copy.name]), both):
            source.read((rows, slice(0, copy.shape[1])), out)
        return (
            None
            if np.array_equal(both[0].view(np.uint8), both[1].view(np.uint8))
            else f"{copy.name} differs from {leaves[copy.path][0].name}"
        )

    starts = [(copy, row) for copy in copies for row in range(0, copy.shape[0], _COMPARED_ROWS)]
    for difference in readers.map(lambda start: differs(*start), starts[jax.process_index() :: jax.process_count()]):
        if difference:
            raise UserError(f"{difference}: an MTP module with an embedding or head of its own is not supported")


def _array(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    values: dict[tuple[int, ...], Stored],
    readers: ThreadPoolExecutor,
    scales: dict[tuple[int, ...], Stored] | None = None,
) -> jax.Array:
    """A parameter of that shape, made of the tensors `values` (index of the leading axes -> tensor), times `scales` where given."""
    of_device = {
        device: tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    made: dict[tuple, jax.Array] = {}  # devices that hold the same slice copy it from the first
    shards = []
    for device, index in of_device.items():
        key = tuple((part.start, part.stop) for part in index)
        if key not in made:
            made[key] = _shard(index, dtype, device, values, scales, readers)
        shards.append(jax.device_put(made[key], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _shard(index, dtype, device, values, scales, readers) -> jax.Array:
    """One device's slice of a parameter."""
    lead = len(next(iter(values)))
    shape, tail = tuple(part.stop - part.start for part in index), index[lead:]
    units = list(itertools.product(*[range(part.start, part.stop) for part in index[:lead]]))
    unit_bytes = next(iter(values.values())).dtype.itemsize * int(np.prod(shape[lead:]))
    per_slab = max(1, _SLAB_BYTES // max(1, unit_bytes))
    place = functools.partial(jax.device_put, device=device)
    buffer = in_flight = None
    for start in range(0, len(units), per_slab):
        chosen = units[start : start + per_slab]
        leading = shape[:lead] if len(chosen) == len(units) else (len(chosen),)
        slab = place(_read_all([values[unit] for unit in chosen], tail, readers).reshape(*leading, *shape[lead:]))
        if scales:
            rows, columns = block_of_rows_and_columns(*tail)
            whole = (slice(rows[0], rows[-1] + 1), slice(0, num_blocks(values[units[0]].shape[-1])))
            blocks = _read_all([scales[unit] for unit in chosen], whole, readers)
            slab = _dequantise(slab, place(blocks.reshape(*leading, *blocks.shape[1:])), rows - rows[0], columns, dtype)
        slab = slab.astype(dtype)
        if len(chosen) == len(units):
            return slab
        if buffer is None:
            buffer = jnp.zeros(shape, dtype, device=device)
        buffer = _insert(buffer, slab, start)
        if in_flight is not None:
            in_flight.block_until_ready()  # two slabs of a parameter on the host, no more
        in_flight = slab
    return buffer


def _read_all(sources: list[Stored], slices: tuple[slice, ...], readers: ThreadPoolExecutor) -> np.ndarray:
    """The same slice of several tensors: [number of tensors, ...]."""
    shape = (len(sources), *(part.stop - part.start for part in slices))
    out = _aligned_empty(shape, sources[0].dtype)
    list(readers.map(lambda source, part: source.read(slices, part), sources, out))
    return out


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over without a copy, which needs 64-byte alignment."""
    size = dtype.itemsize * int(np.prod(shape))
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantise(codes, scales, row_blocks, column_blocks, dtype):
    """codes e4m3 [..., N, K] times the scale of each one's block, in float32."""
    return (codes.astype(jnp.float32) * scales[..., row_blocks, :][..., column_blocks]).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(buffer, slab, start):
    """Puts slab [U, ...] in place: its first axis counts the leading axes of the buffer together."""
    flat = buffer.reshape(-1, *slab.shape[1:])
    return jax.lax.dynamic_update_slice_in_dim(flat, slab, start, 0).reshape(buffer.shape)
