"""Trains a model of everything (dense and MoE layers, MTP, balance loss, router bias) in two microbatches a step on meshes, and in whole
batches on one device.

    python tests/parallel/compare_meshes.py float64 data=2,expert=2 expert=4 ...      prints a JSON line for each mesh

{"mesh": ..., "loss": the largest relative difference of the losses and terms of all steps, "gradient": that of any gradient (clipped by
its global norm) after the first, "bias": that of the router biases at the end}
"""

import dataclasses
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp

if __name__ == "__main__" and sys.argv[1] == "float64":
    # The model asks for float32 by this name in every place where it wants to be exact: so all of it computes in float64.
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64

import numpy as np

from dsv3_jax.config import OptimizerConfig, TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.precision import FLOAT32
from dsv3_jax.training import router_bias
from dsv3_jax.training.schedules import Scheduled
from dsv3_jax.training.step import Trainer
from tests import draw, micro

MODEL = dataclasses.replace(micro.MODEL, vocab_size=96, max_position_embeddings=64, initializer_range=0.1)
STEPS = 3


def train(mesh: str, dtype: str, microbatch_size: int | None) -> tuple[list[dict], dict, dict]:
    """(the metrics of every step, the gradients of the first, the router biases at the end)."""
    config = TrainConfig(
        model=MODEL,
        optimizer=OptimizerConfig(moment_dtype=dtype, clip_norm=0.1),
        batch_size=16,
        microbatch_size=microbatch_size,
        sequence_length=12,
        pipeline_schedule="zb1p",  # two stages for two layers
    )
    sizes = meshes.parse(mesh)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    trainer = Trainer(Decoder(MODEL, FLOAT32, remat="norms_and_up"), config, meshes.make(mesh, devices))
    # Parameters are drawn in one precision, so that every run starts from the same ones.
    params = jax.tree.map(lambda p: p.astype(dtype), draw.parameters(trainer.spread.decoder(1.0)))
    state = jax.jit(trainer.init, out_shardings=trainer.shardings)(params)
    scheduled, rng, history = Scheduled(1e-3, 0.3, 1e-3), np.random.default_rng(0), []
    for step in range(STEPS):
        tokens = rng.integers(0, 96, (16, 13)).astype(np.int32)
        mask = (rng.random((16, 12)) < np.linspace(0.3, 1, 16)[:, None]).astype(np.float32)  # devices have different numbers of targets
        state, metrics = trainer.step(state, jax.device_put({"tokens": tokens, "loss_mask": mask}, trainer.batch_sharding), scheduled)
        history.append(jax.device_get(metrics))
        if step == 0:
            gradients = jax.device_get(state.adam.mu)
    return history, gradients, jax.device_get(router_bias.split(state.params)[1])


def worst(found, expected) -> float:
    """The largest difference of any leaf, relative to the largest value of that leaf."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - b)) / max(np.max(np.abs(b)), 1e-300)) for a, b in pairs)


def compare(dtype: str, names: list[str]) -> list[dict]:
    history, gradients, biases = train("data=1", dtype, None)
    rows = []
    for name in names:
        other, other_gradients, other_biases = train(name, dtype, 8)
        terms = [[{k: v for k, v in metrics.items() if k != "fill"} for metrics in run] for run in (other, history)]
        row = {"mesh": name, "loss": worst(*terms), "gradient": worst(other_gradients, gradients), "bias": worst(other_biases, biases)}
        rows.append(row)
    return rows


if __name__ == "__main__":
    for row in compare(sys.argv[1], sys.argv[2:]):
        print(json.dumps(row), flush=True)
