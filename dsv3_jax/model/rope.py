"""Rotary position embedding on adjacent pairs, YaRN, and the softmax scale that goes with it (DeepSeek-V3 report §4.3)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position for each pair, float32 [R/2]. With YaRN the slow ones are divided by `factor`, the fast ones kept."""
    dim, theta, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return frequencies.astype(np.float32)

    def pair_with(rotations):  # the (fractional) pair that turns `rotations` times within the original context
        return dim * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return (frequencies * (1 - ramp) + frequencies / scaling.factor * ramp).astype(np.float32)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """(N + R)^-1/2, times YaRN's temperature correction squared."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= _mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of `positions` [...] int32, each float32 [..., R/2]."""
    multiplier = 1.0
    if (scaling := config.rope_scaling) is not None:
        multiplier = _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(config)
    return jnp.cos(angles) * multiplier, jnp.sin(angles) * multiplier


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate adjacent pairs of x [..., R] by cos, sin [..., R/2], in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)  # kept together: nothing is transposed
    turned = jnp.flip(pairs, -1) * jnp.stack([-sin, sin], axis=-1)
    return (pairs * cos[..., None] + turned).reshape(x.shape).astype(x.dtype)
