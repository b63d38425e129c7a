"""AdamW against the published formula in float64 numpy, and against Optax's with float32 moments."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.model import Decoder
from dsv3_jax.training import optimizer, router_bias

DECAYS = {"matrix": True, "norm": False}


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {"matrix": rng.normal(size=(6, 4)).astype(np.float32), "norm": np.ones(4, np.float32)}
    return params, [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(5)]


def run(transformation, params, gradients, **options):
    state = transformation.init(params)
    for g in gradients:
        updates, state = transformation.update(g, state, params, **options)
        params = optax.apply_updates(params, updates)
    return params, state


def test_with_float32_moments_it_is_adamw(problem):
    params, gradients = problem
    config = OptimizerConfig(moment_dtype="float32")
    found, _ = run(optimizer.adamw(config, DECAYS), params, gradients, learning_rate=0.01)
    expected, _ = run(optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=DECAYS), params, gradients)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_moments(problem):
    """Moments are rounded to bfloat16 between steps and nothing else is."""
    params, gradients = problem
    config = OptimizerConfig()
    found, state = run(optimizer.adamw(config, DECAYS), params, gradients, learning_rate=0.01)
    for name, p in params.items():
        p, mu, nu = p.astype(np.float64), 0.0, 0.0
        for t, g in enumerate((g[name].astype(np.float64) for g in gradients), 1):
            mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g * g
            p = p - 0.01 * (mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.95**t)) + 1e-8) + (0.1 * p if DECAYS[name] else 0))
            mu, nu = (x.astype(ml_dtypes.bfloat16).astype(np.float64) for x in (mu, nu))
        np.testing.assert_allclose(found[name], p, rtol=1e-4, atol=1e-5)
        assert state.mu[name].dtype == state.nu[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(state.mu[name], np.float64), mu, rtol=2**-7)
        np.testing.assert_allclose(np.asarray(state.nu[name], np.float64), nu, rtol=2**-7)
    assert state.count == 5


def test_matrices_decay_norms_do_not(micro_model):
    weights_axes, biases_axes = router_bias.split(Decoder(micro_model).logical_axes())
    decays = {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(optimizer.decayed(weights_axes))}
    assert {name for name, decays in decays.items() if not decays} == {name for name in decays if "norm" in name}
    assert len([name for name in decays if "norm" in name]) == 1 + 4 + 4 + 3 + 4  # final; two stacks; MTP's own; its layer's
    assert not any("bias" in name for name in decays)
    assert len(jax.tree.leaves(biases_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))) == 2


def test_bias_moves_against_the_load():
    biases = {"moe_layers": {"mlp": {"gate": {router_bias.NAME: jnp.zeros((2, 4))}}}, "mtp": {"gate": {router_bias.NAME: jnp.ones(4)}}}
    load = jnp.array([[4, 0, 2, 2], [8, 0, 0, 0], [0, 1, 2, 1.0]])
    moved = router_bias.update(biases, load, 0.5)
    expected = 0.5 * np.array([[-1, 1, 0, 0], [-1, 1, 1, 1]])
    np.testing.assert_array_equal(moved["moe_layers"]["mlp"]["gate"][router_bias.NAME], expected)
    np.testing.assert_array_equal(moved["mtp"]["gate"][router_bias.NAME], 1 + 0.5 * np.array([1, 0, -1, 0]))
