"""Plain JAX of the grouped products.

Rows are cut into tiles that lie in one group each, and every tile is multiplied with its group's weights: at most M + G tile rows are
computed, not G times M, and no copy of the weights is made per row.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.tiles import group_tiles
from pallas_kernels.matmul.reference import product
from pallas_kernels.quantized import Quantized, pad_to


def grouped_fp8_matmul(a, b, group_sizes, *, out_dtype=jnp.bfloat16, num_sms=None):
    rows_total, k = a.shape
    groups = b.shape[0]
    tile = max(8, min(128, rows_total // groups))
    tiles = group_tiles(group_sizes, tile, rows_total)
    values = pad_to(a.values, (rows_total + tile, k))  # a tile may begin at the last row
    scales = pad_to(a.scales(), (rows_total + tile, a.stored_scales.shape[0]))

    def one_tile(record):
        start, group = record
        x = Quantized.tiles(lax.dynamic_slice_in_dim(values, start, tile), lax.dynamic_slice_in_dim(scales, start, tile))
        w = Quantized.blocks(b.values[group], b.stored_scales[group])
        return product(x.dequantize(), w.dequantize()).astype(out_dtype)

    out = lax.map(one_tile, (tiles.start, jnp.minimum(tiles.group, groups - 1)))

    row = jnp.arange(rows_total, dtype=jnp.int32)
    tile_of_row = (
        jnp.searchsorted(jnp.where(tiles.last > tiles.first, tiles.first, rows_total), row, side="right", method="compare_all") - 1
    )
    rows = out[tile_of_row, row - tiles.start[tile_of_row]]
    return jnp.where((tiles.group[tile_of_row] < groups)[:, None], rows, 0)


def masked_fp8_matmul(a, b, counts, *, expected_count=None, out_dtype=jnp.bfloat16, num_sms=None):
    rows = a.shape[1]

    def one_group(operands):
        x, w, count = operands
        out = product(x.dequantize(), w.dequantize()).astype(out_dtype)
        return jnp.where(jnp.arange(rows)[:, None] < count, out, 0)

    return lax.map(one_group, (a, b, counts))
