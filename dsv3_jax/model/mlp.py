"""The SwiGLU feed-forward network: down(silu(gate x) · up x)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.module import Module, weight
from dsv3_jax.precision import Recipe


def silu_gate(gate_up: jax.Array) -> jax.Array:
    """silu(gate) · up in float32. gate_up [..., 2F], gate first -> [..., F]."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate_up.dtype)


class MLP(Module):
    """A dense feed-forward network of width F; gate and up are one weight [2, F, D], one product."""

    def __init__(self, width: int, hidden: int, config: ModelConfig, recipe: Recipe, rngs: nnx.Rngs):
        self.recipe = recipe
        self.gate_up_proj = weight(rngs, (2, hidden, width), (None, "mlp", "embed"), config.initializer_range)
        self.down_proj = weight(rngs, (width, hidden), ("embed", "mlp"), config.initializer_range)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return self.linear("down_proj", silu_gate(checkpoint_name(self.linear("gate_up_proj", x), "gate_up")))
