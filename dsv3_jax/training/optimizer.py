"""AdamW as the report runs it (§3.3.2, §4.2): float32 arithmetic on float32 masters, both moments kept in bfloat16.

Optax's Adam takes a dtype for the first moment only; this is a GradientTransformation that keeps both in one. Rounding v to bfloat16
needs 1 − β2 well above its resolution of 2^-8: the report's 0.95 is, the usual 0.999 is not (v would then stop moving).

Weight decay is for matrices (the embedding, the head and the router among them), not for the gains of norms; the report does not say
which. The router's selection bias has no optimizer at all: it never comes here (see router_bias.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import OptimizerConfig


class AdamState(NamedTuple):
    """count: updates made, int32; mu, nu: the moments in the structure of the parameters."""

    count: jax.Array
    mu: Any
    nu: Any


def decayed(logical_axes: dict) -> dict:
    """True for each parameter that decays, by the logical names of its axes: a matrix has two besides the stack of layers."""
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return jax.tree.map(lambda axes: len([axis for axis in axes if axis != "layers"]) >= 2, logical_axes, is_leaf=is_axes)


def adamw(config: OptimizerConfig, decays: dict) -> optax.GradientTransformationExtraArgs:
    """AdamW with decoupled decay. `update` takes the learning rate by name, as schedules give it; `decays`: see `decayed`."""
    dtype = jnp.dtype(config.moment_dtype)

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)  # noqa: E731
        return AdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(gradients, state, params, *, learning_rate):
        count = state.count + 1
        correction1, correction2 = (1 - beta ** count.astype(jnp.float32) for beta in (config.beta1, config.beta2))

        def leaf(g, mu, nu, p, decays):
            mu = config.beta1 * mu.astype(jnp.float32) + (1 - config.beta1) * g
            nu = config.beta2 * nu.astype(jnp.float32) + (1 - config.beta2) * g * g
            step = (mu / correction1) / (jnp.sqrt(nu / correction2) + config.eps)
            if decays:
                step = step + config.weight_decay * p
            return -learning_rate * step, mu.astype(dtype), nu.astype(dtype)

        leaves = jax.tree.map(leaf, gradients, state.mu, state.nu, params, decays)
        updates, mu, nu = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), leaves)
        return updates, AdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
