"""The exchange of serving against that of one device, and moves of experts against indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import module, moe
from dsv3_jax.parallel import eplb, replicas
from dsv3_jax.precision import FLOAT32
from tests import draw

CONFIG = ModelConfig(
    hidden_size=64,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    n_shared_experts=0,
    initializer_range=0.1,
)
SHAPES = jax.eval_shape(lambda: module.init(lambda rngs: moe.MoE(CONFIG, FLOAT32, rngs), jax.random.key(0)))


def mesh_of(devices):
    axes = ("data", "expert")
    return jax.make_mesh((1, devices), axes, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices])


def run(params, x, used, mesh=None, plan=None):
    """The MoE layer with its stats, on one device, or over a mesh whose slots hold the experts of `plan`."""
    exchange = moe.exchange_locally if mesh is None else replicas.Dropless.over(CONFIG, mesh)
    template = module.abstract(lambda rngs: moe.MoE(CONFIG, FLOAT32, rngs, exchange))

    def here(params, x, used):
        y, stats = module.bind(template, params)(x, used)
        return y, stats.load_E if mesh is None else jax.lax.psum(stats.load_E, "expert")

    if mesh is None:
        return jax.jit(here)(params, x, used)
    experts = {name: leaf[plan] for name, leaf in params["experts"].items()}
    experts["slots"] = jnp.asarray(eplb.index(plan[None], 8)[0][0], jnp.int32)
    split, whole = PartitionSpec("expert"), PartitionSpec()
    specs = {"gate": jax.tree.map(lambda _: whole, params["gate"]), "experts": {name: split for name in experts} | {"slots": whole}}
    spread = jax.shard_map(here, mesh=mesh, in_specs=(specs, split, split), out_specs=(split, whole), check_vma=False)
    return jax.jit(spread)({"gate": params["gate"], "experts": experts}, x, used)


@pytest.mark.parametrize(
    "always, skew", [(replicas._ALWAYS, 0.0), (0, 0.0), (0, 10.0)], ids=["room for all", "tight buffers", "too tight: all the room"]
)
def test_what_the_copies_compute_is_what_one_device_computes(monkeypatch, always, skew):
    """Every fourth token is padding: it is not counted, and its output is zero."""
    monkeypatch.setattr(replicas, "_ALWAYS", always)
    params = draw.values(SHAPES, CONFIG.initializer_range)
    params["gate"]["e_score_correction_bias"] = np.float32(skew) * np.arange(8, dtype=np.float32)[::-1]
    x = draw.normal(1, 16, 32, 64)
    used = np.arange(16 * 32).reshape(16, 32) % 4 > 0
    expected, load = jax.device_get(run(params, x, used))
    assert load.sum() == 2 * 0.75 * 16 * 32 and not expected[~used].any()
    plan, _, _ = eplb.rebalance_experts(np.arange(1, 9.0)[None] ** 2, 12, 1, 1, 4)
    found, counted = run(params, x, used, mesh_of(4), plan[0])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(counted, load)


def test_copies_take_turns():
    slots = jnp.array([[0, 3, 5], [1, -1, -1], [2, 4, -1]])
    chosen = replicas.choose(jnp.array([[0, 1], [0, 2], [0, 2], [0, 3], [0, 0]]), slots, jnp.arange(5), 6)
    np.testing.assert_array_equal(chosen, [[0, 1], [3, 4], [5, 2], [0, 6], [3, 3]])


def test_moves_bring_every_expert_to_its_slot(devices=4, experts=16, slots=24):
    rng, mesh = np.random.default_rng(0), mesh_of(devices)
    values = {"a": rng.normal(size=(experts, 3, 2)).astype(np.float32), "b": rng.normal(size=(experts,)).astype(np.float32)}
    place = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("expert")))  # noqa: E731
    plan = np.concatenate([np.arange(experts), rng.integers(0, experts, slots - experts)])
    weights = {name: place(leaf[plan]) for name, leaf in values.items()}
    compiled = replicas.move._cache_size()  # by other tests
    for number in range(6):
        load = np.exp(rng.normal(size=(1, experts)))
        after, _, _ = eplb.rebalance_experts(load, slots, 1, 1, devices, previous=plan[None] if number % 2 else None)
        moves = replicas.Moves.between(plan, after[0], devices)
        # No more travels than the plan's change says (a second copy on a device is made there).
        elsewhere = ~np.eye(devices, dtype=bool)
        assert 0 < (moves.target < 6)[:, elsewhere].sum() <= eplb.moved_replicas(plan[None], after, devices)[0]
        weights = replicas.move(weights, moves.padded(6), np.int32(len(moves.source)), mesh)
        plan = after[0]
        for name, leaf in values.items():
            np.testing.assert_array_equal(weights[name], leaf[plan])
    assert replicas.move._cache_size() <= compiled + 1


def test_added_slots_are_empty():
    mesh = mesh_of(2)
    leaf = jax.device_put(np.arange(1.0, 9), NamedSharding(mesh, PartitionSpec("expert")))
    np.testing.assert_array_equal(replicas.add_slots({"a": leaf}, 5, mesh)["a"], [1, 2, 3, 4, 0, 5, 6, 7, 8, 0])
