"""The router's choice and the order of its rows: by counting where there are few, else by loops and sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import moe


@pytest.fixture(params=[2**24, 0], ids=["counted", "looped"])
def limit(request, monkeypatch):
    monkeypatch.setattr(moe, "_COUNTED", request.param)


def test_top_k_is_that_of_jax(limit):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (5, 3, 32)).astype(np.float32)  # many ties
    x[1, 1, 4:] = -np.inf  # groups that are out
    values, indices = moe._top_k(jnp.asarray(x), 4)
    want_values, want_indices = jax.lax.top_k(x, 4)
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal(indices, want_indices)


def test_bad_scores_choose_experts_that_there_are(limit):
    """A step with NaNs is skipped, but it runs to its end: an index out of range would be read."""
    x = np.random.default_rng(2).normal(size=(4, 32)).astype(np.float32)
    x[0], x[1, ::3], x[2, 5] = np.nan, np.nan, np.nan
    _, indices = moe._top_k(jnp.asarray(x), 4)
    assert np.all((np.asarray(indices) >= 0) & (np.asarray(indices) < 32))


def test_rows_are_sorted_by_expert_in_the_order_of_tokens(limit):
    rng = np.random.default_rng(1)
    experts = np.argsort(rng.random((9, 6)), axis=1)[:, :3].astype(np.int32)
    experts[4] = 6  # of no expert
    stats = moe.RouterStats(jnp.zeros(6), jnp.float32(0), jnp.float32(0))
    routing = moe.Routing(jnp.asarray(experts), jnp.asarray(rng.random((9, 3)), jnp.float32), stats)
    dispatched = moe.dispatch(jnp.arange(9.0)[:, None] * jnp.ones((1, 8)), routing)
    order = np.argsort(experts.reshape(-1), kind="stable")
    np.testing.assert_array_equal(dispatched.order_R, order)
    np.testing.assert_array_equal(dispatched.inverse_R, np.argsort(order))
    np.testing.assert_array_equal(dispatched.group_sizes_E, np.bincount(experts.reshape(-1), minlength=7)[:6])
    np.testing.assert_array_equal(dispatched.x_RD[:, 0], order // 3)
    np.testing.assert_array_equal(dispatched.weights_R, np.asarray(routing.weights_TK).reshape(-1)[order])
