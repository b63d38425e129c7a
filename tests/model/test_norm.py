"""RMSNorm's gradients in bfloat16 against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model.module import rms_norm


def test_the_gain_sums_its_gradient_in_float32():
    """Of thousands of tokens. A sum in bfloat16, which autodiff makes, is 1.3e-2 of its norm off here on a CPU."""
    rng = np.random.default_rng(0)
    x, d = (jnp.asarray(rng.standard_normal((2, 2048, 32)), jnp.bfloat16) for _ in range(2))
    gain = jnp.asarray(rng.uniform(0.5, 2, 32), jnp.float32)
    dx, found = jax.vjp(lambda x, gain: rms_norm(x, gain, 1e-6), x, gain)[1](d)

    x, d, gain = (np.asarray(array, np.float64) for array in (x, d, gain))
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    rounded = np.asarray(jnp.asarray(x * scale, jnp.bfloat16), np.float64)  # before the gain, as the reference implementations do
    expected = (d * rounded).sum((0, 1))
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    normed, d = x * scale, d * gain
    expected = scale * (d - normed * (d * normed).mean(-1, keepdims=True))
    assert np.linalg.norm(np.asarray(dx, np.float64) - expected) < 5e-3 * np.linalg.norm(expected)
