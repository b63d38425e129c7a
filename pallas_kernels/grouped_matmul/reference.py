"""Plain JAX of the grouped products.

Rows are cut into tiles that lie in one group each, and every tile is multiplied with its group's weights: at most M + G tile rows are
computed, not G times M, and no copy of the weights is made per row.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.tiles import group_tiles, num_tiles
from pallas_kernels.matmul.reference import product
from pallas_kernels.quantized import Quantized, pad_to


def grouped_fp8_matmul(a, b, group_sizes, *, out_dtype=jnp.bfloat16, num_sms=None):
    rows_total, k = a.shape
    groups, n, _ = b.shape
    tile = max(8, min(128, rows_total // groups))
    tiles = group_tiles(group_sizes, tile, rows_total)
    values = pad_to(a.values, (rows_total + tile, k))  # a tile may begin at the last row
    scales = pad_to(a.scales(), (rows_total + tile, a.stored_scales.shape[0]))

    def one_tile(record):
        start, group = record
        x = Quantized.tiles(lax.dynamic_slice_in_dim(values, start, tile), lax.dynamic_slice_in_dim(scales, start, tile)).dequantize()
        w = Quantized.blocks(b.values[group], b.stored_scales[group]).dequantize()
        return product(x, w).astype(out_dtype)

    out = lax.map(one_tile, (tiles.start, jnp.minimum(tiles.group, groups - 1)))

    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    row = jnp.arange(rows_total, dtype=jnp.int32)
    group = jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
    safe = jnp.minimum(group, groups - 1)
    offset = row - (ends - sizes)[safe]
    first_tile = jnp.cumsum((sizes + tile - 1) // tile) - (sizes + tile - 1) // tile
    position = jnp.clip((first_tile[safe] + offset // tile) * tile + offset % tile, 0, num_tiles(rows_total, groups, tile) * tile - 1)
    return jnp.where((group < groups)[:, None], out.reshape(-1, n)[position], 0)


def masked_fp8_matmul(a, b, counts, *, out_dtype=jnp.bfloat16, num_sms=None):
    rows = a.shape[1]

    def one_group(operands):
        x, w, count = operands
        out = product(x.dequantize(), w.dequantize()).astype(out_dtype)
        return jnp.where(jnp.arange(rows)[:, None] < count, out, 0)

    return lax.map(one_group, (a, b, counts))
