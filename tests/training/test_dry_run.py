"""What a dry run tells: released sizes, and the bytes that arrays on a mesh really have."""

import dataclasses
import math

import jax
import pytest

from configs import deepseek_v3, moonlight_16b, v2_lite_16b
from configs.small import recipe as small_recipe
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.training import aot, dry_run
from dsv3_jax.training.step import Trainer
from pallas_kernels import aot as compiler


@pytest.mark.parametrize(
    "model, main, mtp",
    [
        (deepseek_v3.model(), 671_026_419_200, 11_610_068_224),
        (v2_lite_16b.model(), 15_706_484_224, 0),
        (moonlight_16b.model(), 15_960_110_208, 0),
    ],
    ids=["deepseek_v3", "v2_lite_16b", "moonlight_16b"],
)
def test_parameters_of_released_models(model, main, mtp):
    counts = dry_run.parameters(model)
    assert (counts["main"], counts["mtp"]) == (main, mtp)


def test_activated_parameters():
    """The report: 37B of the 671B."""
    assert dry_run.parameters(deepseek_v3.model())["activated"] == pytest.approx(37.5e9, rel=0.01)


def test_bytes_are_those_of_the_shards(micro_model, micro_config):
    config, mesh = micro_config(mesh="data=2,expert=4"), meshes.make("data=2,expert=4")
    decoder = Decoder(micro_model)
    trainer = Trainer(decoder, config, mesh)
    state = jax.eval_shape(trainer.init, decoder.abstract_params())

    def held(leaves, shardings):
        shards = jax.tree.map(lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, leaves, shardings)
        return sum(jax.tree.leaves(shards))

    kinds = dry_run.bytes_a_device(config, dict(mesh.shape))
    assert kinds["masters, float32"] == held(state.params, trainer.shardings.params)
    moments = held((state.adam.mu, state.adam.nu), (trainer.shardings.adam.mu, trainer.shardings.adam.nu))
    assert kinds["moments, two of bfloat16"] == moments
    assert kinds["masters, float32"] < kinds["weights of a step, float32"] < 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_the_671b_recipe_leaves_room_for_activations():
    """On 2,048 GPUs; with the weight gradients put off as dualpipev has it, it would not."""
    config = dataclasses.replace(deepseek_v3.recipe(), mesh="data=2,pipe=16,expert=64")
    kinds = dry_run.bytes_a_device(config, meshes.parse(config.mesh))
    # A rank has slots for four MoE layers, 409M parameters on a device each, and two dense ones, embedding, head and the MTP module.
    layers, outside = 4 * 409e6 + 2 * 583e6, 2 * 129280 * 7168 + 512e6
    assert kinds["gradients, float32"] == pytest.approx(4 * (layers + outside), rel=0.01)
    # The MTP module's as masters and as products read them.
    assert kinds["weights of a step, as products read them"] == pytest.approx(2 * (layers + 409e6) + 4 * outside, rel=0.01)
    # The inputs of the four slots of a chunk, of 33 microbatches.
    assert kinds["activations kept for the backward"] == pytest.approx(33 * 4 * 2 * 4096 * 7168, rel=0.01)
    assert kinds["operands of weight gradients that wait"] == 0
    assert sum(kinds.values()) == pytest.approx(62.8e9, rel=0.1)  # XLA's buffers: 62.4 and 63.3 GB, by two versions (benchmarks)
    delayed = dry_run.bytes_a_device(dataclasses.replace(config, pipeline_max_delayed=None), meshes.parse(config.mesh))
    assert delayed["operands of weight gradients that wait"] > 80e9


def small(mesh, precision, schedule, max_delayed):
    sizes = meshes.parse(mesh)
    rows = 8 * sizes["data"] * sizes["expert"]
    return dataclasses.replace(
        small_recipe(),
        mesh=mesh,
        precision=precision,
        remat="norms",
        microbatch_size=rows,
        pipeline_schedule=schedule,
        pipeline_max_delayed=max_delayed,
    )


# `small`, 8 rows a forward pass on each device: the peak that GPUs had, GiB (docs/benchmarks/several_gpus.md).
FAST = [("data=2", "fp8", "dualpipev"), ("pipe=2", "bf16", "dualpipe")]
MEASURED = [
    ("data=1", "bf16", "dualpipev", 31.4),
    ("data=2", "bf16", "dualpipev", 30.5),
    ("expert=2", "bf16", "dualpipev", 31.2),
    ("pipe=2", "bf16", "dualpipe", 52.8),
    ("pipe=2", "bf16", "dualpipev", 51.2),
    ("data=1", "fp8", "dualpipev", 24.7),
    ("data=2", "fp8", "dualpipev", 21.1),
    ("expert=2", "fp8", "dualpipev", 21.0),
    ("pipe=2", "fp8", "dualpipe", 32.1),
    ("pipe=2", "fp8", "dualpipev", 31.3),
]


@pytest.mark.parametrize(
    "mesh, precision, schedule, gib",
    [pytest.param(*row, marks=[] if row[:3] in FAST else pytest.mark.slow, id="-".join(row[:3])) for row in MEASURED],
)
def test_bytes_are_those_that_gpus_needed(mesh, precision, schedule, gib):
    kinds = dry_run.bytes_a_device(small(mesh, precision, schedule, 0), meshes.parse(mesh))
    assert sum(kinds.values()) == pytest.approx(gib * 2**30, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not compiler.available(), reason="needs the dependency group aot")
@pytest.mark.parametrize("mesh, max_delayed", [("pipe=2", None), ("data=2", 0)])
def test_bytes_are_those_that_xla_assigns(mesh, max_delayed):
    """With weight gradients that wait, too, which no GPU has been measured with."""
    config = small(mesh, "bf16", "dualpipev", max_delayed)
    compiled, _ = aot.compile_step(config)
    memory = compiled.memory_analysis()
    assigned = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert sum(dry_run.bytes_a_device(config, meshes.parse(mesh)).values()) == pytest.approx(assigned, rel=0.1)
