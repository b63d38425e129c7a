"""What is computed in which format."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from dsv3_jax.errors import UserError

# Weights of the linears that FP8 recipes compute in FP8, by their names in the parameter dict; released FP8 checkpoints store the same.
FP8_WEIGHTS = frozenset(["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_up_proj", "down_proj"])


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A numeric recipe. compute_dtype: dtype of activations and of the operands of unquantised products."""

    name: str
    compute_dtype: Any

    @property
    def product_precision(self) -> lax.Precision:
        """float32 means float32: a GPU would otherwise use TF32."""
        return lax.Precision.HIGHEST if self.compute_dtype == jnp.float32 else lax.Precision.DEFAULT

    @property
    def router(self) -> "Recipe":
        """The recipe of the router: always float32 (report §3.3.1)."""
        return FLOAT32

    @property
    def unquantised(self) -> "Recipe":
        """The recipe of what FP8 leaves alone: embedding, head, MTP's eh_proj."""
        return self


FLOAT32 = Recipe("float32", jnp.float32)
BF16 = Recipe("bf16", jnp.bfloat16)
_RECIPES = {r.name: r for r in (FLOAT32, BF16)}


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError on an unknown one."""
    if name not in _RECIPES:
        raise UserError(f"unknown precision {name!r}: choose one of {', '.join(_RECIPES)}")
    return _RECIPES[name]
