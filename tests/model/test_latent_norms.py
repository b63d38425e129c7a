"""The norms of the latents have an epsilon of their own."""

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import module
from dsv3_jax.model.attention import MLA, Positions
from dsv3_jax.precision import FLOAT32
from tests import draw


def test_latents_are_normed_with_1e_6_whatever_rms_norm_eps_says():
    """Latents so small that the epsilon decides, against NumPy: queries without RoPE, and what a cache holds."""
    config = ModelConfig(
        hidden_size=16,
        num_attention_heads=2,
        q_lora_rank=6,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=4,
        rms_norm_eps=0.1,
        rope_scaling=None,
    )
    template = module.abstract(lambda rngs: MLA(config, FLOAT32, rngs))
    params, x_BSD = draw.values(module.shapes(template), 2e-4), draw.normal(1, 1, 5, 16)
    where = Positions.of(config, np.arange(5, dtype=np.int32)[None])
    q_BSHd, latent_BSC = jax.jit(lambda params: module.bind(template, params).project(x_BSD, where))(params)

    def normed(x):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    q = normed(x_BSD @ params["q_a_proj"].T) @ params["q_b_proj"].T
    np.testing.assert_allclose(q_BSHd[..., :4], q.reshape(1, 5, 2, 6)[..., :4], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(latent_BSC[..., :8], normed(x_BSD @ params["kv_a_proj_with_mqa"][:8].T), rtol=1e-4, atol=1e-6)
