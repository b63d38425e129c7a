"""A run goes on on any mesh: what is kept lies on disk in one layout, whatever devices it lay on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax import checkpoint
from dsv3_jax.config import OptimizerConfig, TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.training import router_bias
from dsv3_jax.training.schedules import Scheduled
from dsv3_jax.training.step import Trainer, TrainState
from tests import draw
from tests.micro import write_recipe
from tests.parallel.compare_meshes import MODEL

ROOT = Path(__file__).parents[2]


def trainer_on(mesh: str, **fields) -> Trainer:
    config = TrainConfig(model=MODEL, optimizer=OptimizerConfig(ema_decay=0.9), batch_size=8, sequence_length=12, **fields)
    sizes = meshes.parse(mesh)
    return Trainer(Decoder(MODEL), config, meshes.make(mesh, jax.devices()[: int(np.prod(list(sizes.values())))]))


def test_gradients_are_reduced_once_a_step():
    """To the shards of their masters, each array by itself, after the microbatches; experts' gradients over `data` alone."""
    trainer = trainer_on("data=2,expert=2", microbatch_size=4)
    state = jax.eval_shape(trainer.init, Decoder(MODEL).abstract_params())
    batch = {"tokens": jax.ShapeDtypeStruct((8, 13), np.int32)}
    jaxpr = jax.make_jaxpr(trainer.jitted(2.0))(state, batch, Scheduled(1e-3, 0.3, 1e-3))
    found = list(reduce_scatters(jaxpr.jaxpr, False))
    masters, _ = router_bias.split(trainer.shardings.params)
    over = [tuple(axis for entry in leaf.spec if entry for axis in np.atleast_1d(entry).tolist()) for leaf in jax.tree.leaves(masters)]
    axes = [tuple(sorted(axes)) for axes, in_a_loop in found if not in_a_loop]
    assert len(axes) == len(found)
    assert axes.count(("data", "expert")) + axes.count(("data",)) == len(axes) == sum(bool(names) for names in over)
    assert axes.count(("data",)) == 4  # gate and up, down: of the MoE layers and of the MTP module


def reduce_scatters(jaxpr, in_a_loop: bool):
    """(axes, whether it is in a loop) of every reduce-scatter."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reduce_scatter":
            yield np.atleast_1d(eqn.params["axis_name"]).tolist(), in_a_loop
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from reduce_scatters(inner, in_a_loop or eqn.primitive.name in ("scan", "while"))


def items(state: TrainState) -> dict:
    return {"params": state.params, "adam": state.adam, "ema": state.ema}


def test_every_mesh_reads_what_another_wrote(tmp_path):
    trainer = trainer_on("data=2,expert=2")
    expected = draw.parameters(Decoder(MODEL))
    params = jax.device_put(expected, trainer.shardings.params)
    down = params["moe_layers"]["mlp"]["experts"]["down_proj"]
    assert down.addressable_shards[0].data.size * 4 == down.size  # experts over `expert`, masters over `data`
    state = jax.jit(trainer.init, out_shardings=trainer.shardings)(params)
    writer = checkpoint.Writer(tmp_path, {}, keep=1)
    writer.save(1, items(state))
    writer.wait()
    for mesh in ("data=1", "expert=4", "data=2,expert=2x2"):
        trainer = trainer_on(mesh)
        abstract = items(jax.eval_shape(trainer.init, Decoder(MODEL).abstract_params()))
        restored = checkpoint.open_run(tmp_path).load(
            {name: checkpoint.with_shardings(tree, items(trainer.shardings)[name]) for name, tree in abstract.items()}
        )
        for found, wanted in zip(jax.tree.leaves(restored["params"]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert restored["adam"].mu["embed"].sharding == trainer.shardings.adam.mu["embed"]


@pytest.mark.slow
def test_a_run_that_changes_its_mesh_is_the_run_on_one_device(tmp_path):
    recipe = write_recipe(tmp_path, steps=9, batch_size=8, microbatch_size=4, checkpoint_every=3, eval_every=100)
    precise = ["--optimizer.learning-rate", "3e-3", "--optimizer.moment-dtype", "float32", "--data.cache", str(tmp_path / "cache")]

    def train(workdir, mesh, devices, steps):
        """The run is stopped after `steps` by its last checkpoint: what comes later is set aside."""
        command = [sys.executable, "train.py", str(recipe), "--workdir", str(tmp_path / workdir), "--mesh", mesh]
        command += ["--fake-devices", str(devices), *precise, *steps]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"XLA_FLAGS": ""}, timeout=500, capture_output=True, text=True)
        lines = [json.loads(line) for line in (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    whole = train("whole", "data=1", 1, [])
    train("first", "data=2,expert=2", 4, [])
    train("second", "data=1", 1, ["--resume", str(tmp_path / "first" / "3")])
    changed = train("third", "expert=4", 4, ["--resume", str(tmp_path / "second" / "6")])
    first = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in first if "loss" in line], whole, rtol=1e-5)
    np.testing.assert_allclose(changed, whole[6:], rtol=1e-5)
