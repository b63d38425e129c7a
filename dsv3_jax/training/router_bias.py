"""The router's selection bias (report §2.1.2, auxiliary-loss-free balancing): moved by the load, outside gradient and optimizer.

b_i += γ · sign(mean load − load_i)      over the global batch, after each step, in every MoE layer, the MTP module's too
"""

import jax
import jax.numpy as jnp

from dsv3_jax.precision import detach

NAME = "e_score_correction_bias"


def split(params: dict) -> tuple[dict, dict]:
    """(everything else, the biases), as `precision.detach`."""
    return detach(params, lambda name: name == NAME)


def update(biases: dict, load_LE: jax.Array, speed: jax.Array) -> dict:
    """The biases after a step. load [L, E]: tokens each expert got, the MTP layer's last; speed: γ."""
    step_LE = speed * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
    # The main model's are one stack [L, E]; the MTP module's is [E].
    return jax.tree.map(lambda bias: bias + (step_LE[: bias.shape[0]] if bias.ndim == 2 else step_LE[-1]), biases)
