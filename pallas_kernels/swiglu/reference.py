"""Plain JAX."""

import jax.numpy as jnp

from pallas_kernels.quantize.reference import swiglu_gradients


def swiglu_gradient(gate_up, d_hidden, row_weights=None):
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    weights = None if row_weights is None else row_weights.astype(jnp.float32)[:, None]
    _, d_gate, d_up, d_weights = swiglu_gradients(gate, up, d_hidden.astype(jnp.float32), weights)
    d_gate_up = jnp.concatenate([d_gate, d_up], axis=-1).astype(gate_up.dtype)
    return d_gate_up, None if row_weights is None else jnp.sum(d_weights, axis=-1)
