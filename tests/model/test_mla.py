"""MLA by itself: the epsilon of its latents' norms, and the gradient of the RoPE key that all heads share."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import module
from dsv3_jax.model.attention import MLA, Positions
from dsv3_jax.precision import BF16, FLOAT32
from tests import draw


def layer(recipe, std, **fields):
    """(config, template to bind, parameters with that standard deviation) of an attention layer."""
    config = ModelConfig(rope_scaling=None, **fields)
    template = module.abstract(lambda rngs: MLA(config, recipe, rngs))
    return config, template, draw.values(module.shapes(template), std)


def test_latents_are_normed_with_1e_6_whatever_rms_norm_eps_says():
    """Latents so small that the epsilon decides, against NumPy: queries without RoPE, and what a cache holds."""
    sizes = dict(q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)
    config, template, params = layer(FLOAT32, 2e-4, hidden_size=16, num_attention_heads=2, rms_norm_eps=0.1, **sizes)
    x_BSD, where = draw.normal(1, 1, 5, 16), Positions.of(config, np.arange(5, dtype=np.int32)[None])
    q_BSHd, latent_BSC = jax.jit(lambda params: module.bind(template, params).project(x_BSD, where))(params)

    def normed(x):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    q = normed(x_BSD @ params["q_a_proj"].T) @ params["q_b_proj"].T
    np.testing.assert_allclose(q_BSHd[..., :4], q.reshape(1, 5, 2, 6)[..., :4], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(latent_BSC[..., :8], normed(x_BSD @ params["kv_a_proj_with_mqa"][:8].T), rtol=1e-4, atol=1e-6)


def test_heads_sum_the_gradient_of_their_rope_key_in_float32():
    """128 heads. A sum in bfloat16, which autodiff makes, is 7.7e-3 of its norm off here on a CPU; rounding the sum once is 1.6e-3."""
    sizes = dict(kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=16, v_head_dim=2)
    _, template, params = layer(BF16, 1.0, hidden_size=8, num_attention_heads=128, **sizes)
    latent_BSC, dk_BSHd = jnp.asarray(draw.normal(0, 1, 64, 20), jnp.bfloat16), jnp.asarray(draw.normal(1, 1, 64, 128, 18), jnp.bfloat16)
    keys = jax.jit(lambda latent: jax.vjp(lambda x: module.bind(template, params).materialise(x)[0], latent)[1](dk_BSHd)[0])
    found = np.asarray(keys(latent_BSC), np.float64)[..., 4:]
    expected = np.asarray(dk_BSHd, np.float64)[..., 2:].sum(2)
    assert np.linalg.norm(found - expected) < 2.5e-3 * np.linalg.norm(expected)
