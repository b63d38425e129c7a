"""The gradient of the RoPE key that all heads share, in bfloat16 against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import module
from dsv3_jax.model.attention import MLA
from dsv3_jax.precision import BF16
from tests import draw


def test_heads_are_summed_in_float32():
    """128 heads. A sum in bfloat16, which autodiff makes, is 7.7e-3 of its norm off here on a CPU; rounding the sum once is 1.6e-3."""
    config = ModelConfig(
        hidden_size=8,
        num_attention_heads=128,
        kv_lora_rank=4,
        qk_nope_head_dim=2,
        qk_rope_head_dim=16,
        v_head_dim=2,
        rope_scaling=None,
    )
    template = module.abstract(lambda rngs: MLA(config, BF16, rngs))
    params = draw.values(module.shapes(template), 1.0)
    latent_BSC, dk_BSHd = jnp.asarray(draw.normal(0, 1, 64, 20), jnp.bfloat16), jnp.asarray(draw.normal(1, 1, 64, 128, 18), jnp.bfloat16)
    keys = jax.jit(lambda latent: jax.vjp(lambda x: module.bind(template, params).materialise(x)[0], latent)[1](dk_BSHd)[0])
    found = np.asarray(keys(latent_BSC), np.float64)[..., 4:]
    expected = np.asarray(dk_BSHd, np.float64)[..., 2:].sum(2)
    assert np.linalg.norm(found - expected) < 2.5e-3 * np.linalg.norm(expected)
