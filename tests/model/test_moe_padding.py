"""What padding costs no expert reaches nobody: a kernel leaves rows of no expert unwritten."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import module
from dsv3_jax.model.moe import MoE, exchange_locally
from dsv3_jax.precision import FLOAT32
from tests import draw

CONFIG = ModelConfig(hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1)


def unwritten(x_TD, routing, experts):
    """`exchange_locally` of a kernel that leaves NaN where it writes nothing."""
    y_TD, fill = exchange_locally(x_TD, routing, experts)
    return jnp.where(routing.experts_TK[:, :1] < CONFIG.n_routed_experts, y_TD, jnp.nan), fill


def test_what_stands_in_rows_of_no_expert_is_left_out():
    x, used = draw.normal(0, 2, 5, 16), np.arange(5) < np.array([[5], [2]])
    params = draw.values(jax.eval_shape(lambda: module.init(lambda rngs: MoE(CONFIG, FLOAT32, rngs), jax.random.key(0))), 0.5)

    def run(exchange, used):
        layer = module.abstract(lambda rngs: MoE(CONFIG, FLOAT32, rngs, exchange))
        return jax.device_get(jax.jit(lambda params, x: module.bind(layer, params)(x, used))(params, x))

    (ours, stats), (expected, _) = run(unwritten, used), run(exchange_locally, None)
    assert np.isfinite(ours).all() and stats.load_E.sum() == 7 * CONFIG.num_experts_per_tok
    np.testing.assert_allclose(ours[used], expected[used], rtol=1e-5, atol=1e-6)
