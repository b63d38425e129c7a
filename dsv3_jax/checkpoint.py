"""Checkpoints: the only file that calls Orbax.

A run folder holds one folder a step, named by its number:

    runs/tiny/200/params/ train_state/ data/ ...   items, each an Orbax tree that can be loaded alone
    runs/tiny/200/checksums.json                   size and CRC-32 of every file, written last: a step without it is not complete

Arrays are stored in the canonical layout (stacked layers [L, ...]), whatever mesh they lay on, and are restored through their stored
metadata, so that any mesh, or a notebook on one CPU, can load them. Orbax does not notice flipped bits; the checksums do.
"""

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from dsv3_jax.errors import UserError

CHECKSUMS = "checksums.json"
# Orbax logs, with a traceback, what its threads raise; it comes out of `result` as well, and is told from there in one line.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in record.getMessage())
_TEMPORARY, _ORBAX_METADATA = ".orbax-checkpoint-tmp", "_CHECKPOINT_METADATA"  # Orbax's names
_TOGETHER_BYTES = 10**9
# These keep their dtype whatever a loader asks for: block scales and the router's selection bias are float32 by definition.
_FLOAT32_BY_DEFINITION = re.compile(r"(_scale|e_score_correction_bias)$")


def complete_steps(directory: str | Path) -> list[int]:
    """The steps of a run folder that were saved completely, in order."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(d.name) for d in directory.iterdir() if d.name.isdigit() and (d / CHECKSUMS).is_file())


def open_run(path: str | Path, step: int | None = None) -> "Saved":
    """The newest complete step of a run folder, or the one named; `path` may also be a step's own folder.

    Raises UserError where there is none, or where its metadata is damaged.
    """
    path = Path(path).absolute()
    if step is None and path.name.isdigit() and (path / CHECKSUMS).is_file():
        path, step = path.parent, int(path.name)
    steps = complete_steps(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, or a step's folder in it")
    if not steps:
        raise UserError(f"{path} holds no complete checkpoint: give a run folder that training has saved a step in")
    if step is not None and step not in steps:
        raise UserError(f"{path} has no complete step {step}: it has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    saved = Saved(path / str(step), step, {})
    saved.verify(lambda name: "/" not in name or name.endswith("/_METADATA"))
    return dataclasses.replace(saved, config=ocp.checkpointables_metadata(saved.directory).custom_metadata["config"])


@dataclasses.dataclass(frozen=True)
class Saved:
    """One complete step on disk. config: the resolved configuration as plain JSON values, the ModelConfig's under "model"."""

    directory: Path
    step: int
    config: dict

    @property
    def items(self) -> list[str]:
        """The names of the trees that were saved."""
        return sorted(d.name for d in self.directory.iterdir() if (d / "_METADATA").is_file())

    def abstract(self, item: str = "params") -> Any:
        """The shapes and dtypes of an item of arrays, in its structure; none of them is read."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._metadata(item))

    def leaves(self, paths: Iterable[tuple[str, ...]], item: str = "params") -> dict[tuple[str, ...], jax.Array]:
        """Some arrays of an item by their paths, on the first device. Files are not checked: `verify` them once before."""
        paths = set(paths)

        def wanted(at, leaf):
            return leaf if tuple(key.key for key in at) in paths else ocp.PLACEHOLDER

        abstract = jax.tree_util.tree_map_with_path(wanted, with_shardings(self.abstract(item)))
        loaded = ocp.load_checkpointables(self.directory, {item: abstract})[item]
        return {tuple(key.key for key in at): leaf for at, leaf in jax.tree.leaves_with_path(loaded) if isinstance(leaf, jax.Array)}

    def params(self, dtype: Any = None, shardings: Any = None, item: str = "params") -> dict:
        """The parameters as a pure dict of arrays, without the optimizer's state.

        dtype: cast float32 and bfloat16 leaves to it (not scales, not the router's bias; FP8 weights stay as they are).
        shardings: one Sharding for all or a tree of them; by default everything goes to the first device.
        Raises UserError where a file is damaged.
        """

        def wanted(path, leaf):
            cast = dtype is not None and leaf.dtype in (jnp.float32, jnp.bfloat16) and not _FLOAT32_BY_DEFINITION.search(_name(path))
            return jax.ShapeDtypeStruct(leaf.shape, dtype if cast else leaf.dtype)

        abstract = jax.tree_util.tree_map_with_path(wanted, self._metadata(item))
        return self.load({item: with_shardings(abstract, shardings)})[item]

    def load(self, abstract: Mapping[str, Any]) -> dict:
        """The named items as trees of arrays like `abstract` (ShapeDtypeStructs with shardings; Python numbers for numbers).

        Raises UserError that names every leaf that is missing, unexpected or of another shape, or the file that is damaged.
        """
        for item in abstract:
            self._check_has(item)
        self.verify(lambda name: name.partition("/")[0] in abstract)
        for item, tree in abstract.items():
            if problems := differences(tree, self._metadata(item)):
                raise UserError(f"{self.directory / item} does not fit: {problems}. Give a config of the same model")
        return ocp.load_checkpointables(self.directory, dict(abstract))

    def verify(self, wanted=lambda name: True) -> None:
        """Compare files with their checksums. Raises UserError that names the first that differs and the step to fall back on."""
        try:
            checksums = json.loads((self.directory / CHECKSUMS).read_text())
            expected = {name: (int(size), str(crc)) for name, (size, crc) in checksums.items() if wanted(name)}
        except (ValueError, TypeError, AttributeError):
            raise self._damaged(CHECKSUMS) from None
        for name, found in _checksums(self.directory, expected).items():
            if found != expected[name]:
                raise self._damaged(name)

    def _damaged(self, name: str) -> UserError:
        before = [step for step in complete_steps(self.directory.parent) if step < self.step]
        fix = f"use the step before it, {self.directory.parent / str(before[-1])}" if before else "no step before it is left"
        return UserError(f"checkpoint file {self.directory / name} is damaged (its checksum differs); nothing was changed: {fix}")

    def _check_has(self, item: str) -> None:
        if item not in self.items:
            hint = ", with optimizer.ema_decay" if item == "ema" else ""
            raise UserError(f"{self.directory} has no {item!r} (it has {', '.join(self.items)}): give a run that training saved{hint}")

    def _metadata(self, item: str) -> Any:
        self._check_has(item)
        return ocp.metadata(self.directory, checkpointable_name=item).metadata


class Writer:
    """Saves steps of a run asynchronously, keeps the last `keep` complete ones, and clears what an interrupted save has left.

    config: the resolved configuration, stored with every step (see `Saved.config`). Raises UserError where something else lies under a
    step's name. `wait` before the program ends: while Python shuts down Orbax may not start the threads it needs, and a save in flight
    then neither completes nor lets the program go.
    """

    def __init__(self, directory: str | Path, config: dict, *, keep: int):
        self.directory, self.config, self.keep = Path(directory).absolute(), config, keep
        self._finisher: threading.Thread | None = None
        self._error: Exception | None = None
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for folder in self.directory.iterdir():
                number, *temporary = folder.name.split(_TEMPORARY)
                if not number.isdigit() or (not temporary and (folder / CHECKSUMS).is_file()):
                    continue
                if not temporary and not (folder / _ORBAX_METADATA).is_file():
                    raise UserError(
                        f"{folder} is no checkpoint, and steps are saved under such names: remove it, or give another --workdir"
                    )
                shutil.rmtree(folder)

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Start saving trees of arrays and Python numbers; returns when they are copied and may be changed or donated.

        Raises UserError where this save cannot start, or the one before it failed.
        """
        self.wait()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)  # raises here what would come up late and garbled in a thread of Orbax
            saving = ocp.save_checkpointables_async(
                self.directory / str(step), dict(items), overwrite=True, custom_metadata={"config": self.config}
            )
        except OSError as error:
            raise _cannot_save(self.directory, error) from error
        self._finisher = threading.Thread(target=self._finish, args=(saving, step), name=f"checkpoint {step}")
        self._finisher.start()

    def wait(self) -> None:
        """Until what was started is complete. Raises UserError where it failed."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._error is not None:
            error, self._error = self._error, None
            raise _cannot_save(self.directory, error) from error

    def check(self) -> None:
        """Without waiting: raises UserError where the last save has failed already."""
        if self._finisher is not None and not self._finisher.is_alive():
            self.wait()

    def _finish(self, saving, step: int) -> None:
        try:
            saving.result()
            if jax.process_index() == 0:
                _complete(self.directory / str(step))
                for old in complete_steps(self.directory)[: -self.keep]:
                    # First it stops being a step, then it goes: there is no moment at which half a step looks like one.
                    shutil.rmtree((self.directory / str(old)).rename(self.directory / f"{old}{_TEMPORARY}"))
        except Exception as error:  # handed to the thread that saves
            self._error = error


def save_streaming(directory: str | Path, step: int, config: dict, leaves: Iterable[tuple[tuple[str, ...], jax.Array]]) -> None:
    """Save a step that has parameters only, one after another: (path, array). One of them is held, on its devices and on the host.

    An interrupted save is not complete, as with `Writer`, which clears it. Raises UserError where it cannot be written.
    """
    folder = Path(directory).absolute() / str(step)
    for tree in _together(leaves):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)  # not before there is something to write
            ocp.partial.save(folder, tree, custom_metadata={"config": config})
        except Exception as error:  # Orbax raises what its libraries give it
            raise _cannot_save(directory, error) from error
        del tree  # before the next one is made
    try:
        ocp.partial.finalize(folder)
        # Orbax calls the only item of such a checkpoint `state`.
        (folder / "state").rename(folder / "params")
        metadata = folder / _ORBAX_METADATA
        handlers = {"params": f"{ocp.handlers.PyTreeHandler.__module__}.{ocp.handlers.PyTreeHandler.__qualname__}"}
        write_atomically(metadata, json.dumps(json.loads(metadata.read_text()) | {"item_handlers": handlers}))
        _complete(folder)
    except Exception as error:
        raise _cannot_save(directory, error) from error


def _cannot_save(directory: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"cannot save a checkpoint in {directory} ({reason}): make room or rights there; complete steps are intact")


def _together(leaves: Iterable[tuple[tuple[str, ...], jax.Array]]) -> Iterator[dict]:
    """Parameters in trees of `_TOGETHER_BYTES` or a little more: a save takes Orbax half a second, however little it saves."""
    tree, size = {}, 0
    for path, leaf in leaves:
        functools.reduce(lambda at, key: at.setdefault(key, {}), path[:-1], tree)[path[-1]] = leaf
        size += leaf.nbytes
        del leaf
        if size >= _TOGETHER_BYTES:
            yield tree
            tree, size = {}, 0
    if tree:
        yield tree


def differences(expected: Any, found: Any) -> str:
    """What is missing, unexpected or of another shape in a tree, '' if nothing; the first few by name."""
    expected, found = _shapes(expected), _shapes(found)
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            problems.append(f"{name} is {list(found[name])} and should be {list(expected[name])}")
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def set_aside_after(directory: str | Path, step: int) -> list[Path]:
    """Rename the steps later than `step`, so that a run continues from it; returns their new names."""
    moved = []
    for later in complete_steps(directory):
        if later > step:
            source, number = Path(directory) / str(later), 1
            while (target := source.with_name(f"{later}.set-aside-{number}")).exists():
                number += 1
            moved.append(source.rename(target))
    return moved


def _complete(folder: Path) -> None:
    """The checksums of a step's files: with them it is complete."""
    names = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.name != CHECKSUMS]
    write_atomically(folder / CHECKSUMS, json.dumps(_checksums(folder, names), indent=0, sort_keys=True))


def write_atomically(path: Path, text: str) -> None:
    """The file holds either what it held or all of `text`, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def with_shardings(abstract: Any, shardings: Any = None) -> Any:
    """A tree of ShapeDtypeStructs with a sharding each: `shardings` is one for all, a tree, or None (the first device)."""
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, abstract)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings)


def _name(path) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {_name(path): tuple(getattr(leaf, "shape", ())) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """(bytes, CRC-32) of each file; (-1, "") where it cannot be read. Files are read side by side: zlib lets go of the GIL."""

    def checksum(name):
        crc = size = 0
        try:
            with open(folder / name, "rb", buffering=0) as file:
                while block := file.read(1 << 20):
                    crc, size = zlib.crc32(block, crc), size + len(block)
        except OSError:
            return -1, ""
        return size, f"{crc:08x}"

    names = list(names)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(checksum, names)))
