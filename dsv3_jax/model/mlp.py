"""The SwiGLU feed-forward network: down(silu(gate x) · up x)."""

import jax
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.module import Module, weight
from dsv3_jax.precision import Recipe


class MLP(Module):
    """A dense feed-forward network of width F; gate and up are one weight [2, F, D], one product."""

    def __init__(self, width: int, hidden: int, config: ModelConfig, recipe: Recipe, rngs: nnx.Rngs):
        self.recipe = recipe
        self.gate_up_proj = weight(rngs, (2, hidden, width), (None, "mlp", "embed"), config.initializer_range)
        self.down_proj = weight(rngs, (width, hidden), ("embed", "mlp"), config.initializer_range)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return self.swiglu_linear("down_proj", self.linear("gate_up_proj", x))
