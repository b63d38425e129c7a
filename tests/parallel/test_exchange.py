"""The expert exchanges against the exchange of one device, and their buffers against simulated routing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import moe, module
from dsv3_jax.parallel import exchange, sharding
from dsv3_jax.precision import BF16, FLOAT32, FP8_REFERENCE

CONFIG = ModelConfig(
    hidden_size=128, moe_intermediate_size=64, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=0,
    initializer_range=0.1,
)  # fmt: skip
MESHES = {
    "expert=2": {"expert": 2},
    "expert=4": {"expert": 4},
    "expert=2x2": {"node": 2, "local": 2},
    "expert=4x2": {"node": 4, "local": 2},
}
TOKENS = 64


def layer(recipe, exchange):
    return module.abstract(lambda rngs: moe.MoE(CONFIG, recipe, rngs, exchange))


def weights_and_tokens(skew=0.0):
    params = module.init(lambda rngs: moe.MoE(CONFIG, FLOAT32, rngs), jax.random.key(0))
    params["gate"]["e_score_correction_bias"] = skew * jnp.arange(16.0)[::-1]
    x = jax.random.normal(jax.random.key(1), (8, TOKENS // 8, 128))
    return params, x, jax.random.normal(jax.random.key(2), x.shape)


def value_and_gradients(recipe, params, x, dy, sizes=None, make=None):
    """(y, fill, dparams, dx) of sum(y · dy), on one device or over a mesh."""
    template = layer(recipe, make or moe.exchange_locally)

    def run(params, x, dy):
        def total(params, x):
            y, stats = module.bind(template, params)(x.astype(recipe.compute_dtype))
            return jnp.sum(y.astype(jnp.float32) * dy), (y.astype(jnp.float32), stats.fill)

        (_, (y, fill)), (dparams, dx) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)
        return y, fill, dparams, dx

    if make is None:
        return jax.jit(run)(params, x, dy)
    axes = sharding.expert_axes(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    specs = jax.tree.map(lambda names: sharding.weight_spec(names, sizes), module.logical_axes(template), is_leaf=sharding.is_names)
    rows = PartitionSpec(axes)

    def run_here(params, x, dy):
        y, fill, dparams, dx = run(params, x, dy)
        dparams["gate"] = jax.lax.psum(dparams["gate"], axes)
        return y, jax.lax.pmax(fill, axes), dparams, dx

    spread = jax.shard_map(
        run_here, mesh=mesh, in_specs=(specs, rows, rows), out_specs=(rows, PartitionSpec(), specs, rows), check_vma=False
    )
    return jax.jit(spread)(params, x, dy)


def assert_same(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.max(jnp.abs(b))), rtol=0)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("size", [2.0, np.inf])
def test_padded_exchange_is_the_local_one(mesh, size):
    sizes = MESHES[mesh]
    params, x, dy = weights_and_tokens()
    y, _, dparams, dx = value_and_gradients(FLOAT32, params, x, dy)
    found = value_and_gradients(FLOAT32, params, x, dy, sizes, exchange.over_mesh(CONFIG, sizes, size))
    assert found[1] <= 1
    assert_same((found[0], *found[2:]), (y, dparams, dx), 2e-6)


def test_all_gather_exchange_is_the_local_one():
    sizes = {"expert": 4}
    params, x, dy = weights_and_tokens()
    y, _, dparams, dx = value_and_gradients(FLOAT32, params, x, dy)
    found = value_and_gradients(FLOAT32, params, x, dy, sizes, exchange.gathered(sizes))
    assert_same((found[0], *found[2:]), (y, dparams, dx), 2e-6)


@pytest.mark.parametrize("mesh", ["expert=4", "expert=2x2"])
def test_what_does_not_fit_is_reported(mesh):
    """All tokens want the first experts: buffers for balanced routing do not hold them, and the largest always do."""
    sizes = MESHES[mesh]
    params, x, dy = weights_and_tokens(skew=10.0)
    tight = value_and_gradients(FLOAT32, params, x, dy, sizes, exchange.over_mesh(CONFIG, sizes, 1.0))
    assert tight[1] > 1
    y, _, dparams, dx = value_and_gradients(FLOAT32, params, x, dy)
    found = value_and_gradients(FLOAT32, params, x, dy, sizes, exchange.over_mesh(CONFIG, sizes, np.inf))
    assert found[1] <= 1
    assert_same((found[0], *found[2:]), (y, dparams, dx), 2e-6)
