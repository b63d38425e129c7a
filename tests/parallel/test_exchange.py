"""The expert exchanges against the exchange of one device."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import module, moe
from dsv3_jax.parallel import exchange, sharding
from dsv3_jax.precision import FLOAT32, FP8_REFERENCE
from tests import draw

CONFIG = ModelConfig(
    hidden_size=128,
    moe_intermediate_size=64,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    n_shared_experts=0,
    initializer_range=0.1,
)
SHAPES = jax.eval_shape(lambda: module.init(lambda rngs: moe.MoE(CONFIG, FLOAT32, rngs), jax.random.key(0)))
MESHES = {
    "expert=2": {"expert": 2},
    "expert=4": {"expert": 4},
    "expert=2x2": {"node": 2, "local": 2},
    "expert=4x2": {"node": 4, "local": 2},
}


def weights_and_tokens(skew=0.0):
    params = draw.values(SHAPES, CONFIG.initializer_range)
    params["gate"]["e_score_correction_bias"] = np.float32(skew) * np.arange(16, dtype=np.float32)[::-1]
    return params, draw.normal(1, 8, 8, 128), draw.normal(2, 8, 8, 128)


def value_and_gradients(recipe, sizes=None, make=moe.exchange_locally, gradients=True):
    """A function of (params, x, dy): y, the gradients of sum(y · dy) (None without `gradients`), and the fill; on one device or over a
    mesh."""
    template = module.abstract(lambda rngs: moe.MoE(CONFIG, recipe, rngs, make))

    def run(params, x, dy):
        def total(params, x):
            y, stats = module.bind(template, params)(x.astype(recipe.compute_dtype))
            return jnp.sum(y.astype(jnp.float32) * dy), (y.astype(jnp.float32), stats.fill)

        if not gradients:
            _, (y, fill) = total(params, x)
            return (y, None, None), fill
        (_, (y, fill)), (dparams, dx) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)
        return (y, dparams, dx), fill

    if sizes is None:
        return jax.jit(run)
    axes = sharding.expert_axes(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    specs = jax.tree.map(lambda names: sharding.weight_spec(names, sizes), module.logical_axes(template), is_leaf=sharding.is_names)
    rows = PartitionSpec(axes)

    def run_here(params, x, dy):
        (y, dparams, dx), fill = run(params, x, dy)
        if gradients:
            dparams["gate"] = jax.lax.psum(dparams["gate"], axes)
        return (y, dparams, dx), jax.lax.pmax(fill, axes)

    out = (rows, specs if gradients else None, rows if gradients else None), PartitionSpec()
    return jax.jit(jax.shard_map(run_here, mesh=mesh, in_specs=(specs, rows, rows), out_specs=out, check_vma=False))


@functools.cache
def on_one_device(recipe, skew=0.0, gradients=True):
    return value_and_gradients(recipe, gradients=gradients)(*weights_and_tokens(skew))[0]


def assert_same(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(np.max(np.abs(b))), rtol=0)


@pytest.mark.parametrize("mesh", [pytest.param("expert=2", marks=pytest.mark.slow), "expert=4", "expert=4x2"])
def test_padded_exchange_is_the_local_one(mesh):
    """Values and gradients, those of the router through the routing weights among them."""
    sizes = MESHES[mesh]
    found, fill = value_and_gradients(FLOAT32, sizes, exchange.over_mesh(CONFIG, sizes, 2.5))(*weights_and_tokens())
    assert 0.2 < fill <= 1
    assert_same(found, on_one_device(FLOAT32), 2e-6)


def test_all_gather_exchange_is_the_local_one():
    sizes = {"expert": 4}
    found, fill = value_and_gradients(FLOAT32, sizes, exchange.gathered(sizes))(*weights_and_tokens())
    assert fill <= 1
    assert_same(found, on_one_device(FLOAT32), 2e-6)


@pytest.mark.parametrize("mesh", ["expert=4", "expert=2x2"])
def test_what_does_not_fit_is_reported(mesh):
    """All tokens want the first experts: buffers for balanced routing do not hold them, and the largest always do."""
    sizes, arguments = MESHES[mesh], weights_and_tokens(skew=10.0)

    def forward(size):
        return value_and_gradients(FLOAT32, sizes, exchange.over_mesh(CONFIG, sizes, size), gradients=False)(*arguments)

    _, fill = forward(1.0)
    assert fill > 1
    found, fill = forward(np.inf)
    assert fill <= 1
    assert_same(found, on_one_device(FLOAT32, 10.0, gradients=False), 2e-6)


def test_fp8_sends_tiles_and_gets_bfloat16_back():
    sizes = {"expert": 4}
    run = value_and_gradients(FP8_REFERENCE, sizes, exchange.over_mesh(CONFIG, sizes, 2.5))
    sent = re.findall(r":(\w+)\[\d+,(\d+)\] = all_to_all", str(jax.make_jaxpr(run)(*weights_and_tokens())))
    # Out: 128 codes of a byte with 4 weights, 4 experts and one scale of four, padded. Back: results. Their transposes: gradients out, then
    # back, 128 of two bytes, and those of the weights.
    assert Counter(sent) == Counter({("u8", "256"): 1, ("bf16", "128"): 2, ("u16", "128"): 1, ("f32", "4"): 1})
    found, fill = run(*weights_and_tokens())
    assert fill <= 1
    (y, dparams, dx), (y1, dparams1, dx1) = found, on_one_device(FP8_REFERENCE)
    assert_same(y, y1, 1e-2)  # the same codes, sums in another order rounded to bfloat16
    assert_same((dx, dparams["gate"]["weight"]), (dx1, dparams1["gate"]["weight"]), 2e-2)
    assert_same(dparams["experts"], dparams1["experts"], 5e-2)  # tiles along tokens hold other tokens
