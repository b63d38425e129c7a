"""What is computed in which format: the table of the report's FP8 framework (§3.3), and the recipes that use it."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.errors import UserError


class Scales(NamedTuple):
    """Which scales of a product are powers of two: those of tensors that are quantised along tokens too, or sent, without new error."""

    input: bool = False
    gradient: bool = False


# The linears that FP8 recipes compute in FP8, all three products of each (Fprop, Dgrad, Wgrad; report Figure 6), by their names in the
# parameter dict; released FP8 checkpoints store the same ones in FP8. For the backward pass each keeps its input in FP8, or recomputes it:
#
#   weight                            input                           kept for the backward pass               power-of-two scales
FP8_WEIGHTS = {
    "q_proj": Scales(),  #              normed residual                 nothing: RMSNorm is recomputed
    "q_a_proj": Scales(),  #            normed residual                 nothing: RMSNorm is recomputed
    "kv_a_proj_with_mqa": Scales(),  #  normed residual                 nothing: RMSNorm is recomputed
    "q_b_proj": Scales(),  #            normed query latent             q_a_proj's output, bf16: up-projection recomputed
    "kv_b_proj": Scales(),  #           normed key/value latent         kv_a_proj's output, bf16: up-projection recomputed
    "o_proj": Scales(input=True),  #    attention output                it, bf16 (attention's own backward pass needs it)
    "gate_up_proj": Scales(input=True),  # dispatched tokens            it, e4m3: quantised before the dispatch
    "down_proj": Scales(gradient=True),  # SwiGLU of gate_up            gate_up, e4m3: SwiGLU is recomputed
}
# What they leave alone (report §3.3.1):
#
#   embedding, output head, MTP's eh_proj      products in bf16
#   attention core                             bf16, softmax in float32
#   normalisations, RoPE, SwiGLU               float32 inside, bf16 between
#   router (MoE gate)                          float32
#   residual stream, combine                   bf16
#   master weights and their gradients         float32; both Adam moments bf16


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A numeric recipe.

    compute_dtype: of activations and of the operands of unquantised products.
    fp8: how the products of FP8_WEIGHTS run: None (unquantised), "hopper" (the kernels), "reference" (plain JAX).
    num_sms: on how many SMs products run; None for all of them. Fewer leave room for communication.
    in_parts: dense float32 products as sums of bfloat16 ones (`products.einsum`), which tensor cores compute.
    """

    name: str
    compute_dtype: Any
    fp8: Literal["hopper", "reference"] | None = None
    num_sms: int | None = None
    in_parts: bool = False

    @property
    def product_precision(self) -> lax.Precision:
        """float32 means float32: a GPU would otherwise use TF32."""
        return lax.Precision.HIGHEST if self.compute_dtype == jnp.float32 else lax.Precision.DEFAULT

    @property
    def router(self) -> "Recipe":
        """The recipe of the router: always float32 (report §3.3.1)."""
        return FLOAT32 if self.compute_dtype == jnp.float32 else FLOAT32_IN_PARTS

    @property
    def unquantised(self) -> "Recipe":
        """The recipe of what FP8 leaves alone: embedding, head, MTP's eh_proj."""
        return dataclasses.replace(self, fp8=None) if self.fp8 else self


FLOAT32 = Recipe("float32", jnp.float32)
FLOAT32_IN_PARTS = Recipe("float32_in_parts", jnp.float32, in_parts=True)
BF16 = Recipe("bf16", jnp.bfloat16)
FP8 = Recipe("fp8", jnp.bfloat16, fp8="hopper")
FP8_REFERENCE = Recipe("fp8_reference", jnp.bfloat16, fp8="reference")
_RECIPES = {r.name: r for r in (FLOAT32, BF16, FP8, FP8_REFERENCE)}


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError on an unknown one."""
    if name not in _RECIPES:
        raise UserError(f"unknown precision {name!r}: choose one of {', '.join(_RECIPES)}")
    return _RECIPES[name]


def check_devices(recipe: Recipe, devices: Any = None) -> None:
    """Raises UserError where the recipe's kernels cannot run on `devices` (this process's by default): before anything is compiled."""
    for device in jax.local_devices() if devices is None else devices:
        capability = getattr(device, "compute_capability", None)
        if recipe.fp8 == "hopper" and capability != "9.0":
            has = device.device_kind if capability is None else f"{device.device_kind}, compute capability {capability}"
            raise UserError(
                f"precision={recipe.name!r} needs an NVIDIA Hopper GPU (H100 or H200, sm_90), and this is {has}: "
                f"precision='fp8_reference' runs the same recipe in plain JAX anywhere"
            )
