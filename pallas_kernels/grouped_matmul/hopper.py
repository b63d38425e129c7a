"""The grouped products on Hopper: the GEMM kernel over a table of row tiles that is made on the device from the group sizes."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.gemm import ROWS, Problem, Table, Unit, block_scaled_gemm
from pallas_kernels.grouped_matmul.tiles import group_tiles, running_sum
from pallas_kernels.platform import device_sms
from pallas_kernels.quantized import num_blocks, pad_operand


def grouped_fp8_matmul(a, b, group_sizes, *, out_dtype=jnp.bfloat16, num_sms=None, config=None, interpret=None):
    (m, k), (groups, n, _) = a.shape, b.shape
    num_sms = num_sms or device_sms()
    config = config or tuning.choose("grouped_matmul", -(-m // groups), n, k, num_sms, groups)
    a, b = pad_operand(a, rows=ROWS), pad_operand(b, rows=64)

    tiles = group_tiles(group_sizes, config.tile_m, m, align=ROWS)
    steps = jnp.where(tiles.group < groups, num_blocks(k), 0)  # nothing is multiplied for rows of no group: they become zeros
    valid = (tiles.first - tiles.start) << 16 | (tiles.last - tiles.start)
    units = Unit(lax.div(tiles.start, ROWS), valid, jnp.minimum(tiles.group, groups - 1), 0, steps)
    table = Table.of(units, jnp.sum(tiles.last > tiles.first))

    problem = Problem(cols=n, out_type=jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), out_dtype), grouped=("b",), ragged=True)
    return block_scaled_gemm(config, problem, a, b, table=table, num_sms=num_sms, interpret=interpret)[:m, :n]


def masked_fp8_matmul(a, b, counts, *, out_dtype=jnp.bfloat16, num_sms=None, config=None, interpret=None):
    (groups, rows, k), n = a.shape, b.shape[1]
    num_sms = num_sms or device_sms()
    # how full the room is, the host does not know: in decode it is mostly a few rows
    config = config or tuning.choose("masked_matmul", min(rows, 128), n, k, num_sms, groups)
    a, b = pad_operand(a, rows=ROWS), pad_operand(b, rows=64)

    most = -(-rows // config.tile_m)
    tiles = (jnp.clip(counts, 0, rows).astype(jnp.int32) + config.tile_m - 1) // config.tile_m
    end = running_sum(tiles)
    index = jnp.arange(groups * most, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(index[:, None] >= end[None, :], axis=1, dtype=jnp.int32), groups - 1)
    tile = index - (end - tiles)[group]
    table = Table.of(Unit(tile * (config.tile_m // ROWS), 0, group, 0, num_blocks(k)), end[-1])

    out_type = jax.ShapeDtypeStruct((groups, a.shape[1], b.shape[1]), out_dtype)
    problem = Problem(cols=n, out_type=out_type, grouped=("a", "b", "out"))
    return block_scaled_gemm(config, problem, a, b, table=table, num_sms=num_sms, interpret=interpret)[:, :rows, :n]
