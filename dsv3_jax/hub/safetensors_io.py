"""Safetensors files: headers, slices, and files written tensor by tensor.

A file is 8 bytes (length of the header, little-endian), the header (JSON: name -> dtype, shape, data_offsets), and the data. The
`safetensors` package reads and writes whole tensors; here a reader takes only its slice, into memory that is already there, and a
writer holds one tensor at a time.
"""

import json
import math
import operator
import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Stored(NamedTuple):
    """A tensor in a file: where its bytes begin, and what they are."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, slices: tuple[slice, ...], out: np.ndarray) -> None:
        """Reads the slice (bounds given, step 1) into `out`, which is contiguous and of this dtype. Only its rows are read."""
        if len(slices) == 2 and slices[1] != slice(0, self.shape[1]):  # some columns: through the page cache, touching little else
            out[...] = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[slices]
        else:
            row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
            _read_into(self.path, self.offset + slices[0].start * row_bytes, memoryview(out.reshape(-1).view(np.uint8)))


def _read_into(path: Path, offset: int, buffer: memoryview) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise UserError(f"{path} ended while it was read: it has been changed; load it again")
                buffer = buffer[count:]
    except OSError as error:
        raise _unreadable(path, error) from error


def open_checkpoint(directory: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint, from one file or where its index says. Reads headers only; raises UserError for a file cut short."""
    index_path = directory / INDEX
    if not index_path.exists():
        if not (directory / SINGLE).exists():
            raise UserError(f"{directory} has neither {INDEX} nor {SINGLE}: give a directory with a safetensors checkpoint")
        return read_header(directory / SINGLE)
    try:
        file_of = dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(file_of.values()))
        "".join(files)  # raises TypeError where they are no names
    except OSError as error:
        raise _unreadable(index_path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index_path} is not an index of safetensors files ({error!r}): download it again") from error
    if absent := [name for name in files if not (directory / name).exists()]:
        raise UserError(f"{directory} lacks {first_few(absent)} of the {len(files)} files in {INDEX}: download them")
    headers = {name: read_header(directory / name) for name in files}
    if absent := [tensor for tensor, name in file_of.items() if tensor not in headers[name]]:
        raise UserError(f"{index_path} names files that lack {first_few(absent)}: download the checkpoint again")
    return {tensor: headers[name][tensor] for tensor, name in file_of.items()}


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises UserError where the file is shorter or longer than its header says."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{path} is cut short or no safetensors file: {size} bytes, less than its header; download it again")
            raw = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        bounds = {name: _bounds(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a damaged header ({error!r}): download it again") from error
    end = 8 + length + max((stop for *_, stop in bounds.values()), default=0)
    if size != end:
        raise UserError(f"{path} is {'cut short' if size < end else 'too long'}: {size} bytes, {end} by its header; download it again")
    stored = {}
    for name, (code, shape, start, stop) in bounds.items():
        if code not in _DTYPES:
            raise UserError(f"{path}: {name} has dtype {code}, which is not supported: only {', '.join(_DTYPES)} are")
        if stop - start != _DTYPES[code].itemsize * math.prod(shape):
            raise UserError(f"{path}: {name} is {stop - start} bytes, which {code} {list(shape)} is not; download it again")
        stored[name] = Stored(path, 8 + length + start, shape, _DTYPES[code])
    return stored


def _bounds(entry: dict) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, start, stop) of a tensor in a header; raises ValueError, KeyError or TypeError where it is none."""
    shape, (start, stop) = tuple(map(operator.index, entry["shape"])), map(operator.index, entry["data_offsets"])
    if min(start, *shape) < 0:
        raise ValueError(f"a tensor of shape {list(shape)} that begins at {start}")
    return str(entry["dtype"]), shape, start, stop


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path} ({error.strerror}): make it readable, or download it again")


class Writer:
    """A safetensors file whose tensors are known beforehand and come in any order. Use as a context manager."""

    def __init__(self, path: Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype]]):
        # Widest dtypes first, so that every tensor is aligned to its own items, as readers that map the file want it.
        self._tensors, self._offsets, header, position = tensors, {}, {"__metadata__": {"format": "pt"}}, 0
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
            end = position + dtype.itemsize * int(np.prod(shape))
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            self._offsets[name], position = position, end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._data = 8 + len(raw)
        self._file = open(path, "xb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(len(raw).to_bytes(8, "little") + raw)
        self._missing = set(tensors)

    def write(self, name: str, value: np.ndarray) -> None:
        shape, dtype = self._tensors[name]
        assert value.shape == shape and value.dtype == dtype, (name, value.shape, value.dtype, shape, dtype)
        self._file.seek(self._data + self._offsets[name])
        self._file.write(memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8)))
        self._missing.remove(name)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            assert not self._missing, self._missing
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def first_few(names: list[str], count: int = 3) -> str:
    """'a, b, c and 7 more'."""
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
