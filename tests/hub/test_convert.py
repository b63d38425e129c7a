"""`python -m dsv3_jax.hub`: Hugging Face directories to runs and back."""

import dataclasses
import gc
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import checkpoint, command_line
from dsv3_jax.checkpoint import Writer
from dsv3_jax.config import TrainConfig, to_dict
from dsv3_jax.errors import UserError
from dsv3_jax.hub import bench
from dsv3_jax.hub.__main__ import main, to_hf, to_orbax

MODELS = Path(__file__).parents[1] / "data" / "models"


def equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize(("name", "precision"), [("tiny_e_fp8_mtp", "fp8"), ("tiny_s_plain", "float32")])
def test_to_orbax_and_back(name, precision, raw, tmp_path):
    """Every byte of every tensor comes back; the run in between is a run like any other."""
    to_orbax(MODELS / name, tmp_path / "run")
    model, run = dsv3_jax.load(MODELS / name), dsv3_jax.load(tmp_path / "run")
    assert run.config == model.config
    assert checkpoint.open_run(tmp_path / "run").config["precision"] == ("float32" if precision == "float32" else "auto")
    equal_trees(run.params, model.params)
    assert run.tokenizer.encode("def f(x): 1") == model.tokenizer.encode("def f(x): 1")
    to_hf(tmp_path / "run", tmp_path / "out", precision)
    assert raw(tmp_path / "out") == raw(MODELS / name)
    equal_trees(dsv3_jax.load(tmp_path / "out").params, model.params)


def test_a_run_in_fp8_loads_onto_a_mesh_and_dequantised(tmp_path):
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    to_orbax(MODELS / "tiny_e_fp8_mtp", tmp_path / "run")
    equal_trees(dsv3_jax.load(tmp_path / "run", mesh=mesh).params, dsv3_jax.load(MODELS / "tiny_e_fp8_mtp").params)
    exact = dsv3_jax.load(MODELS / "tiny_e_fp8_mtp", weights="dequantised", dtype=np.float32)
    equal_trees(dsv3_jax.load(tmp_path / "run", weights="dequantised", dtype=np.float32).params, exact.params)


def test_a_checkpoint_saved_on_another_topology(tmp_path):
    """Saved from four devices with experts spread, it loads on one, whole or by step, and in another dtype."""
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    model = dsv3_jax.load(MODELS / "tiny_s_plain", mesh=mesh)
    writer = Writer(tmp_path / "run", to_dict(TrainConfig(model=model.config)), keep=3)
    writer.save(7, {"params": model.params})
    writer.wait()
    equal_trees(dsv3_jax.load(tmp_path / "run").params, dsv3_jax.load(MODELS / "tiny_s_plain").params)
    half = dsv3_jax.load(tmp_path / "run" / "7", dtype="bfloat16")
    assert half.params["embed"].dtype == "bfloat16" and half.tokenizer is None
    assert half.params["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"].dtype == np.float32
    with pytest.raises(UserError, match="has no complete step 8: it has 7"):
        dsv3_jax.load(tmp_path / "run", step=8)


def test_a_damaged_run_is_refused_before_anything_is_written(tmp_path):
    to_orbax(MODELS / "tiny_s_plain", tmp_path / "run")
    largest = max((tmp_path / "run" / "0" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        to_hf(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["to-orbax", "{tmp}/nowhere", "{tmp}/run"], "No such file"),
        (["to-orbax", "{tmp}/model", "{tmp}/model"], "is not an empty directory"),
        (["to-orbax", "{tmp}/model", "{tmp}/run"], "tokenizer.json is not a tokenizer"),
        (["to-orbax", "{tmp}/index", "{tmp}/run"], "is not an index of safetensors files"),
        (["to-orbax", "{tmp}/folder", "{tmp}/run"], "cannot read {tmp}/folder/model.safetensors (Is a directory)"),
        (["to-orbax", "{tmp}/list", "{tmp}/run"], "config.json is no JSON object"),
        (["to-orbax", "{tmp}/model"], "run"),
        (["to-hf", "{tmp}/nowhere", "{tmp}/run"], "does not exist"),
        (["to-hf", "{tmp}/nowhere", "{tmp}/run", "--precision", "fp9"], "invalid choice 'fp9'"),
        (["to-hff"], "to-hff"),
        ([], "to-orbax"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(argv, message, tmp_path, monkeypatch, capsys):
    """Before anything is written; of what is wrong with a checkpoint as of wrong options."""
    source = MODELS / "tiny_s_plain"
    for folder in ("model", "index", "folder", "list"):
        (tmp_path / folder).mkdir()
        shutil.copy(source / "config.json", tmp_path / folder)
    (tmp_path / "model" / "model.safetensors").symlink_to(source / "model.safetensors")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    (tmp_path / "index" / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    (tmp_path / "folder" / "model.safetensors").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    monkeypatch.setattr(sys, "argv", ["hub", *(arg.format(tmp=tmp_path) for arg in argv)])
    assert command_line.run(main) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message.format(tmp=tmp_path) in errors
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    """As TensorStore tells it, which knows no OSError."""

    def full(*args, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device")

    monkeypatch.setattr(checkpoint.ocp.partial, "save", full)
    with pytest.raises(UserError, match=r"cannot save a checkpoint in .*run .*No space left on device"):
        to_orbax(MODELS / "tiny_s_plain", tmp_path / "run")


def test_to_orbax_holds_one_parameter_at_a_time(tmp_path, monkeypatch):
    """However many there are: what is alive at any save is the parameter that is saved."""
    source, alive, save = MODELS / "tiny_s_plain", [], checkpoint.ocp.partial.save
    expected = dsv3_jax.load(source).params
    gc.collect()  # what other tests have left
    before = sum(array.nbytes for array in jax.live_arrays())

    def recorded(folder, tree, **options):
        alive.append((sum(array.nbytes for array in jax.live_arrays()) - before, sum(leaf.nbytes for leaf in jax.tree.leaves(tree))))
        save(folder, tree, **options)

    monkeypatch.setattr(checkpoint.ocp.partial, "save", recorded)
    monkeypatch.setattr(checkpoint, "_TOGETHER_BYTES", 0)
    to_orbax(source, tmp_path / "run")
    assert len(alive) == len(jax.tree.leaves(expected)) and not [pair for pair in alive if pair[0] > pair[1]]
    equal_trees(dsv3_jax.load(tmp_path / "run").params, expected)


def test_bench_measures_what_it_made(tmp_path, monkeypatch, capsys):
    """With a small checkpoint, and without dd: not every file system can be read past the page cache."""
    small = dataclasses.replace(bench.TWO_LAYERS, hidden_size=128, num_attention_heads=2, intermediate_size=128, moe_intermediate_size=128)
    bench.make(tmp_path / "made", small)
    model = dsv3_jax.load(tmp_path / "made")
    assert model.params["moe_layers"]["mlp"]["experts"]["down_proj"].dtype == "float8_e4m3fn"
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(model.params))
    monkeypatch.setattr(bench, "dd", lambda files: bench.forget(files) or 1.0)
    bench.run(tmp_path / "made", 2)
    assert capsys.readouterr().out.count("of dd") == 2
