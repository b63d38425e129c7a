"""Plain JAX."""

import jax.numpy as jnp

from pallas_kernels.quantized import BLOCK, num_blocks, pad_to


def gather_rows(index, *parts, columns=None):
    if len(parts) > 1:
        x = jnp.concatenate([pad_to(part, (len(part), num_blocks(part.shape[1]) * BLOCK)) for part in parts], axis=1)
    else:
        x = parts[0][:, :columns]
    return x.at[index].get(mode="fill", fill_value=0)
