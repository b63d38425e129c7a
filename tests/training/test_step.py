"""One step on one device: gradients, clipping, router bias, moving average, steps left out (meshes: tests/parallel/test_spread.py)."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.precision import BF16, FP8, FP8_REFERENCE, attach
from dsv3_jax.training import loss, router_bias
from dsv3_jax.training.schedules import Scheduled
from dsv3_jax.training.step import Trainer
from tests import draw

SCHEDULED = Scheduled(learning_rate=1e-3, mtp_loss_weight=0.3, bias_update_speed=0.01)
BAD_TOKEN = 299
EXACT = {"xla_allow_excess_precision": False}  # or roundings to bfloat16 are left out in one of two programs


@pytest.fixture(scope="module")
def setup(micro_model, micro_config):
    """decoder (a MoE layer and the MTP module), config, initial parameters, a batch of 8 rows, a varying part of them to be predicted."""
    model = dataclasses.replace(micro_model, num_hidden_layers=1, first_k_dense_replace=0)
    config = micro_config(model=model, optimizer=OptimizerConfig(ema_decay=0.9, moment_dtype="float32", clip_norm=0.5))
    decoder = Decoder(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, BAD_TOKEN, (8, 33)).astype(np.int32)
    mask = (np.arange(32) < rng.integers(4, 32, (8, 1))).astype(np.float32)
    return decoder, config, draw.parameters(decoder), {"tokens": tokens, "loss_mask": mask}


def start(trainer, params):
    return jax.jit(trainer.init, out_shardings=trainer.shardings)(params)


@pytest.fixture(scope="module")
def whole(setup):
    """(trainer, state and metrics after one step on the whole batch)."""
    decoder, config, params, batch = setup
    trainer = Trainer(decoder, config)
    return trainer, *trainer.step(start(trainer, params), batch, SCHEDULED)


def close(a, b, rtol=1e-4):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=rtol * float(np.abs(np.asarray(y)).max()) + 1e-9, err_msg=jax.tree_util.keystr(path))


def test_metrics_and_first_moments_are_the_loss_s(setup, whole):
    """The step reports `loss_and_terms` of the batch, and its first moments are (1 − β1) times the clipped gradient."""
    decoder, config, params, batch = setup
    _, state, metrics = whole

    def total(params):
        return loss.loss_and_terms(decoder, params, batch, mtp_loss_weight=0.3, balance_loss_weight=config.optimizer.balance_loss_weight)

    (value, terms), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    close({name: metrics[name] for name in terms}, terms)
    gradient, _ = router_bias.split(jax.device_get(gradient))
    norm = np.sqrt(sum(float((g.astype(np.float32) ** 2).sum()) for g in jax.tree.leaves(gradient)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.6  # so that it is clipped, to 0.5
    close(state.adam.mu, jax.tree.map(lambda g: 0.1 * 0.5 * g / norm, gradient))


# In FP8 the bits of one product: tests/precision/test_fp8.py, test_a_weight_quantised_beforehand_gives_the_same_bits.
@pytest.mark.parametrize("recipe", [BF16, pytest.param(FP8_REFERENCE, marks=pytest.mark.slow)])
def test_what_is_made_of_the_weights_once_a_step_is_what_products_make_of_them(setup, micro_model, recipe):
    """The loss of four microbatches, bit for bit, and their gradients, to the order of float32 sums: without forms, of stacks in a loop.

    Of every kind of layer, a dense one too.
    """
    _, config, _, batch = setup
    decoder, count, balance = Decoder(micro_model, recipe), 4, config.optimizer.balance_loss_weight
    trainer, (weights, biases) = Trainer(decoder, config), router_bias.split(draw.parameters(decoder))
    over = jax.tree.map(lambda n: n / count, loss.num_targets(batch))

    def one(weights, microbatch):
        params = attach(weights, biases)
        return loss.loss_and_terms(decoder, params, microbatch, mtp_loss_weight=0.3, balance_loss_weight=balance, over=over)[0]

    local = functools.partial(trainer._gradients, decoder, count)
    ours, total, _ = jax.jit(trainer.spread.gradients(local), compiler_options=EXACT)(weights, biases, batch, SCHEDULED)
    alone = jax.jit(jax.value_and_grad(one), compiler_options=EXACT)
    parts = [alone(weights, {name: leaf[i::count] for name, leaf in batch.items()}) for i in range(count)]
    value, expected = jax.tree.map(lambda *leaves: functools.reduce(np.add, map(np.asarray, leaves)) / np.float32(count), *parts)
    assert total == value
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype(np.float32)}
    close(ours, expected, rtol=1e-6)


def test_bias_follows_the_load_and_nothing_else(setup, whole):
    """Once each step, in both MoE layers, by γ and the sign of what is missing to the mean load."""
    _, state, metrics = whole
    _, biases = router_bias.split(state.params)
    moved = np.stack([biases["moe_layers"]["mlp"]["gate"][router_bias.NAME][0], biases["mtp"]["layer"]["mlp"]["gate"][router_bias.NAME]])
    load = np.asarray(metrics["load"])
    np.testing.assert_allclose(moved, 0.01 * np.sign(load.mean(1, keepdims=True) - load), rtol=1e-6)
    assert (moved != 0).any() and load.sum() == 2 * 8 * 32 * 2
    assert router_bias.NAME not in str(jax.tree.structure(state.adam.mu))  # it has no optimizer


def test_moving_average(setup, whole):
    """It starts as the parameters, and goes on from itself."""
    _, _, params, batch = setup
    trainer, average = whole[0], params
    state = start(trainer, params)
    for _ in range(3):
        state, _ = trainer.step(state, batch, SCHEDULED)
        average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * np.asarray(new), average, state.params)
        close(state.ema, average, rtol=1e-6)


def test_non_finite_steps_change_nothing_and_are_counted(setup, whole):
    """A token whose embedding is infinite: its batches are skipped, all state but the counters stays bit for bit."""
    _, _, params, good = setup
    trainer = whole[0]
    params = params | {"embed": params["embed"].copy()}
    params["embed"][BAD_TOKEN] = np.inf
    state = start(trainer, params)
    bad = good | {"tokens": good["tokens"].copy()}
    bad["tokens"][3, 0] = BAD_TOKEN
    counts = []
    for batch in (good, bad, bad, good, bad):
        before = jax.tree.map(np.asarray, (state.params, state.adam, state.ema))
        state, metrics = trainer.step(state, batch, SCHEDULED)
        counts.append((int(state.skipped), int(state.skipped_in_row)))
        after = jax.tree.map(np.asarray, (state.params, state.adam, state.ema))
        same = [np.array_equal(a, b, equal_nan=True) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after))]
        assert all(same) if batch is bad else not all(same)
        assert bool(np.isfinite(metrics["loss"])) == (batch is good)
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert state.adam.count == 2


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_fp8_overflow_is_counted_per_tensor_and_its_step_skipped(setup, count):
    """An infinite gain before a dense layer: its first product has one bad tile a token, in a whole batch as in two microbatches."""
    decoder, config, _, batch = setup
    decoder = Decoder(dataclasses.replace(decoder.config, first_k_dense_replace=1, num_nextn_predict_layers=0), FP8_REFERENCE)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(), microbatch_size=len(batch["tokens"]) // count)
    trainer = Trainer(decoder, config)
    params, found = draw.parameters(decoder), []
    for gain in (1, np.inf):
        params["dense_layers"]["input_layernorm"][0, 3] = gain
        state, metrics = trainer.step(start(trainer, params), batch, SCHEDULED)
        found.append((int(metrics["overflow"]["dense_layers"]["self_attn"]["q_a_proj_overflow"][0, 0]), int(state.skipped)))
    assert found == [(0, 0), (8 * 32, 1)]


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(FP8_REFERENCE, marks=pytest.mark.slow), pytest.param(FP8, marks=pytest.mark.multi_gpu)],
    ids=lambda recipe: recipe.name,
)
def test_a_pipeline_counts_overflows_as_one_device_does(setup, micro_model, recipe):
    """Of the layers, one for each rank, and of the MTP module, by weight."""
    _, config, _, batch = setup
    decoder = Decoder(micro_model, recipe)
    params = draw.parameters(decoder)
    params["moe_layers"]["post_attention_layernorm"][0, 3] = np.inf
    config, counts = dataclasses.replace(config, model=micro_model, microbatch_size=1, pipeline_schedule="1f1b"), []
    for sizes in ("data=1", "pipe=2"):
        mesh = meshes.make(sizes, jax.devices()[: 2 if "2" in sizes else 1])
        trainer = Trainer(decoder, config, mesh)
        state, metrics = trainer.step(start(trainer, params), batch, SCHEDULED)
        assert state.skipped == 1
        counts.append(jax.device_get(metrics["overflow"]))
    jax.tree.map(np.testing.assert_array_equal, *counts)
    moe = counts[1]["moe_layers"]["mlp"]
    assert moe["shared_experts"]["gate_up_proj_overflow"][0, 0] == 8 * 32  # a tile of every token
    assert counts[1]["mtp"]["layer"]["mlp"]["shared_experts"]["down_proj_overflow"][0] > 0
