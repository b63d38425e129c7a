"""What padding costs no expert reaches nobody: a kernel leaves rows of no expert unwritten."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import MoE, exchange_locally
from dsv3_jax.precision import FLOAT32

CONFIG = ModelConfig(hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1)


def unwritten(x_TD, routing, experts):
    """`exchange_locally` of a kernel that leaves NaN where it writes nothing."""
    y_TD, fill = exchange_locally(x_TD, routing, experts)
    return jnp.where(routing.experts_TK[:, :1] < CONFIG.n_routed_experts, y_TD, jnp.nan), fill


def test_what_stands_in_rows_of_no_expert_is_left_out():
    x, used = jax.random.normal(jax.random.key(0), (2, 5, 16)), jnp.arange(5) < jnp.array([[5], [2]])
    ours, stats = MoE(CONFIG, FLOAT32, nnx.Rngs(0), exchange=unwritten)(x, used)
    expected, _ = MoE(CONFIG, FLOAT32, nnx.Rngs(0))(x)
    assert np.isfinite(ours).all() and stats.load_E.sum() == 7 * CONFIG.num_experts_per_tok
    np.testing.assert_allclose(ours[used], expected[used], rtol=1e-5, atol=1e-6)
