"""Checkpoints: complete or not there, checked on load, the same on any topology."""

import errno
import json
import os
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax import checkpoint
from dsv3_jax.errors import UserError


class Moments(NamedTuple):
    mu: dict
    nu: dict


def tree(value: float) -> dict:
    value = float(value)
    gate = {"weight": jnp.full((8, 16), value), "e_score_correction_bias": jnp.full((8,), value)}
    codes = {"w": jnp.full((128, 128), value, jnp.float8_e4m3fn), "w_scale": jnp.full((1, 1), value)}
    return {"embed": jnp.full((64, 16), value), "moe_layers": {"gate": gate}, "fp8": codes}


@pytest.fixture
def folder(tmp_path):
    """A run folder with steps 1, 2 and 3."""
    writer = checkpoint.Writer(tmp_path / "run", {"model": {"hidden_size": 16}}, keep=3)
    for step in (1, 2, 3):
        moments = Moments({"embed": jnp.full((64, 16), step, jnp.bfloat16)}, {"embed": jnp.full((64, 16), -step, jnp.bfloat16)})
        writer.save(step, {"params": tree(step), "train_state": {"adam": moments}, "data": {"step": step, "row": 1 << 40, "rows": "abc"}})
    writer.wait()
    return tmp_path / "run"


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and (np.asarray(x) == np.asarray(y)).all(), a, b))


def test_round_trip(folder):
    saved = checkpoint.open_run(folder)
    assert (saved.step, saved.config, saved.items) == (3, {"model": {"hidden_size": 16}}, ["data", "params", "train_state"])
    assert equal(saved.params(), tree(3))
    assert equal(checkpoint.open_run(folder, 2).params(), tree(2)) and equal(checkpoint.open_run(folder / "1").params(), tree(1))
    abstract = checkpoint.with_shardings({"adam": Moments(*[{"embed": jax.ShapeDtypeStruct((64, 16), jnp.bfloat16)}] * 2)})
    loaded = saved.load({"train_state": abstract, "data": {"step": 0, "row": 0, "rows": ""}})
    assert loaded["data"] == {"step": 3, "row": 1 << 40, "rows": "abc"}
    assert isinstance(loaded["train_state"]["adam"], Moments) and float(loaded["train_state"]["adam"].nu["embed"][5, 5]) == -3


def test_an_item_that_was_not_saved(folder):
    saved = checkpoint.open_run(folder)
    for read in (lambda: saved.params(item="ema"), lambda: saved.abstract("ema"), lambda: saved.load({"ema": tree(0)})):
        with pytest.raises(UserError, match=r"3 has no 'ema' .it has data, params, train_state.: give a run .* optimizer\.ema_decay$"):
            read()


def test_dtype_spares_scales_biases_and_codes(folder):
    params = checkpoint.open_run(folder).params(jnp.bfloat16)
    dtypes = {jax.tree_util.keystr(path): str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert dtypes == {
        "['embed']": "bfloat16",
        "['moe_layers']['gate']['weight']": "bfloat16",
        "['moe_layers']['gate']['e_score_correction_bias']": "float32",
        "['fp8']['w']": "float8_e4m3fn",
        "['fp8']['w_scale']": "float32",
    }


def test_any_topology(folder, tmp_path):
    """Saved from eight devices, loaded on one, and the other way round."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda leaf: rows if leaf.shape[0] % 8 == 0 else whole, tree(0))
    spread = checkpoint.open_run(folder).params(shardings=shardings)
    assert len(spread["embed"].sharding.device_set) == 8 and equal(spread, tree(3))
    writer = checkpoint.Writer(tmp_path / "spread", {}, keep=1)
    writer.save(7, {"params": spread})
    writer.wait()
    back = checkpoint.open_run(tmp_path / "spread").params()
    assert len(back["embed"].sharding.device_set) == 1 and equal(back, tree(3))


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    """What is saved is the state at the call, whatever overwrites its buffers afterwards."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    writer, x = checkpoint.Writer(tmp_path, {}, keep=10), jnp.zeros((512, 1024))
    for step in range(5):
        writer.save(step, {"params": {"x": x}})
        for _ in range(10):
            x = add(x)
    writer.wait()
    for step in range(5):
        assert (np.asarray(checkpoint.open_run(tmp_path, step).params()["x"]) == 10 * step).all()


def test_keeps_the_last(tmp_path):
    writer = checkpoint.Writer(tmp_path, {}, keep=2)
    for step in (5, 10, 15):
        writer.save(step, {"params": {"x": jnp.zeros(3)}})
    writer.wait()
    assert checkpoint.complete_steps(tmp_path) == [10, 15] and not (tmp_path / "5").exists()


def data_files(step_folder):
    return [f for f in step_folder.rglob("*") if f.is_file() and f.stat().st_size and f.name != checkpoint.CHECKSUMS]


def test_every_flipped_byte_is_refused(folder):
    """A byte of every file of a step, one after the other: the error names the file and the step before, nothing else changes."""
    files = data_files(folder / "3")
    assert len(files) > 10
    for file in files:
        good = file.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        file.write_bytes(bad)
        before = sorted(folder.rglob("*"))
        with pytest.raises(UserError, match=r"damaged") as error:
            saved = checkpoint.open_run(folder)
            saved.load(dict.fromkeys(saved.items))  # what is asked for does not matter: files come first
            saved.params()
        assert str(file) in str(error.value) and str(folder / "2") in str(error.value) and "\n" not in str(error.value)
        assert sorted(folder.rglob("*")) == before and checkpoint.complete_steps(folder) == [1, 2, 3]
        file.write_bytes(good)
    assert equal(checkpoint.open_run(folder).params(), tree(3))


def test_missing_file_and_damaged_checksums(folder):
    largest = max(data_files(folder / "3" / "params"), key=lambda f: f.stat().st_size)
    largest.unlink()
    with pytest.raises(UserError, match=largest.name):
        checkpoint.open_run(folder).params()
    (folder / "2" / checkpoint.CHECKSUMS).write_text("{")
    with pytest.raises(UserError, match=checkpoint.CHECKSUMS):
        checkpoint.open_run(folder, 2)


def test_damage_elsewhere_does_not_matter(folder):
    """Parameters alone are loaded, so the optimizer's files are not read."""
    max(data_files(folder / "3" / "train_state"), key=lambda f: f.stat().st_size).write_bytes(b"")
    if all(f.stat().st_size for f in (folder / "3").rglob("_METADATA")):
        assert equal(checkpoint.open_run(folder).params(), tree(3))


def test_incomplete_steps_are_not_there(folder):
    """What a kill leaves: a folder without checksums, a temporary folder. Neither counts, a new writer clears both."""
    (folder / "3" / checkpoint.CHECKSUMS).unlink()
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "4.orbax-checkpoint-tmp" / "half").write_text("x")
    (folder / "notes").mkdir()
    assert checkpoint.open_run(folder).step == 2
    checkpoint.Writer(folder, {}, keep=3)
    assert sorted(os.listdir(folder)) == ["1", "2", "notes"]


def test_what_is_no_checkpoint_is_not_cleared(tmp_path):
    """A folder of photographs, in a folder that somebody has taken for a run."""
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "photograph").write_text("x")
    with pytest.raises(UserError, match="2024 is no checkpoint"):
        checkpoint.Writer(tmp_path, {}, keep=3)
    assert (tmp_path / "2024" / "photograph").exists()


@pytest.mark.parametrize(
    "target, message",
    [
        ({"embed": (64, 16), "fp8": (1,)}, "missing fp8"),
        ({"moe_layers": (1,)}, "unexpected embed"),
    ],
)
def test_wrong_trees_are_named(folder, target, message):
    abstract = checkpoint.with_shardings({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in target.items()})
    with pytest.raises(UserError, match=message):
        checkpoint.open_run(folder).load({"params": abstract})


def test_wrong_shape_is_named(folder):
    abstract = jax.eval_shape(lambda: tree(0)) | {"embed": jax.ShapeDtypeStruct((32, 16), jnp.float32)}
    with pytest.raises(UserError, match=r"embed is \[64, 16\] and should be \[32, 16\]"):
        checkpoint.open_run(folder).load({"params": checkpoint.with_shardings(abstract)})


@pytest.mark.parametrize(
    "path, step, message",
    [
        ("nowhere", None, "does not exist"),
        (".", None, "holds no complete checkpoint"),
        ("run", 9, "has no complete step 9: it has 1, 2, 3"),
    ],
)
def test_no_such_checkpoint(folder, path, step, message):
    with pytest.raises(UserError, match=message):
        checkpoint.open_run(folder.parent / path, step)


def test_set_aside(folder):
    assert [p.name for p in checkpoint.set_aside_after(folder, 1)] == ["2.set-aside-1", "3.set-aside-1"]
    assert checkpoint.complete_steps(folder) == [1]


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    """In the background: the next call says so, and what was complete stays."""
    writer = checkpoint.Writer(tmp_path, {}, keep=1)
    writer.save(1, {"params": {"x": jnp.zeros(3)}})
    writer.wait()

    class Failing:
        def result(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", lambda *args, **options: Failing())
    for told in (writer.wait, writer.check):
        writer.save(2, {"params": {"x": jnp.zeros(3)}})
        writer._finisher.join()
        with pytest.raises(UserError, match=r"cannot save a checkpoint .*No space left"):
            told()
        writer.check()  # once
    assert checkpoint.complete_steps(tmp_path) == [1]


def test_a_save_that_cannot_start_is_told(tmp_path):
    writer = checkpoint.Writer(tmp_path / "run", {}, keep=1)
    writer.save(1, {"params": {"x": jnp.zeros(3)}})
    writer.wait()
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").write_text("a file where the run folder was")
    with pytest.raises(UserError, match="cannot save a checkpoint"):
        writer.save(2, {"params": {"x": jnp.zeros(3)}})
        writer.wait()
    assert checkpoint.complete_steps(tmp_path / "moved") == [1]


def test_write_atomically_never_shows_half(tmp_path):
    path, seen, stop = tmp_path / "file", set(), threading.Event()
    texts = [json.dumps([letter] * 20000) for letter in "ab"]
    checkpoint.write_atomically(path, texts[0])

    def read():
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(50):
        checkpoint.write_atomically(path, texts[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(texts)
