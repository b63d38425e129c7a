"""Plain JAX of the weight-gradient products: float32 products of the dequantised operands, which have the tokens last."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.reference import product
from pallas_kernels.quantize.reference import padded_starts
from pallas_kernels.quantized import BLOCK


def fp8_wgrad(a, b, accumulate=None, *, num_sms=None):
    out = product(a.dequantize(), b.dequantize())
    return out if accumulate is None else accumulate + out


def grouped_fp8_wgrad(a, b, group_sizes, accumulate=None, *, num_sms=None):
    n, tokens = a.shape
    k, groups = b.shape[0], group_sizes.shape[0]
    out = jnp.zeros_like(a.stored_scales, shape=(groups, n, k)) if accumulate is None else accumulate
    tiles = tokens // BLOCK
    group = jnp.searchsorted(padded_starts(group_sizes), jnp.arange(tiles, dtype=jnp.int32) * BLOCK, side="right", method="compare_all") - 1

    def add_tile(out, operands):
        group, x, y = operands
        term = jnp.where(group < groups, product(x, y), 0)  # the tokens after the last group belong to nobody
        return out.at[jnp.minimum(group, groups - 1)].add(term), None

    def by_tile(x):  # [N, T] -> [T/128, N, 128]
        return jnp.moveaxis(x.reshape(x.shape[0], tiles, BLOCK), 1, 0)

    return lax.scan(add_tile, out, (group, by_tile(a.dequantize()), by_tile(b.dequantize())))[0]
