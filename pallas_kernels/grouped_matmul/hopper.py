"""The grouped products on Hopper: the GEMM kernel over a table of row tiles that is made on the device from the group sizes."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.gemm import ROWS, Problem, Table, Unit, gemm
from pallas_kernels.grouped_matmul.tiles import group_tiles, running_sum
from pallas_kernels.platform import device_sms
from pallas_kernels.quantized import num_blocks, pad_operand
from pallas_kernels.scaled import Scaled


def grouped_fp8_matmul(a, b, group_sizes, *, out_dtype=jnp.bfloat16, num_sms=None, config=None, interpret=None):
    (m, k), (groups, n, _) = a.shape, b.shape
    num_sms = num_sms or device_sms()
    config = config or tuning.choose("grouped_matmul", -(-m // groups), n, k, num_sms, groups)
    a, b = pad_operand(a, rows=ROWS), pad_operand(b, rows=64)

    table = ragged_rows(group_sizes, config, m, num_blocks(k))
    problem = Problem(cols=n, out_type=jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), out_dtype), grouped=("b",), ragged=True)
    return gemm(config, problem, Scaled(b.kind), Scaled.arrays(a, b), table=table, num_sms=num_sms, interpret=interpret)[:m, :n]


def ragged_rows(group_sizes, config, rows, steps):
    """The units of rows that are sorted by group, with `steps` along K. Nothing is multiplied for rows of no group: they become zeros.

    Where neighbours in a cluster share `b`, a group has a whole number of clusters, of whose last the end may have no rows.
    """
    groups, share = group_sizes.shape[0], config.cluster if config.multicast == "b" else 1
    tiles = group_tiles(group_sizes, config.tile_m, rows, align=ROWS, share=share)
    steps = jnp.where(tiles.group < groups, steps, 0)
    valid = (tiles.first - tiles.start) << 16 | (tiles.last - tiles.start)
    return Table.of(Unit(lax.div(tiles.start, ROWS), valid, jnp.minimum(tiles.group, groups - 1), 0, steps), tiles.count)


def masked_fp8_matmul(a, b, counts, *, expected_count=None, out_dtype=jnp.bfloat16, num_sms=None, config=None, interpret=None):
    (groups, rows, k), n = a.shape, b.shape[1]
    num_sms = num_sms or device_sms()
    config = config or tuning.choose("masked_matmul", min(rows, expected_count or 128), n, k, num_sms, groups)
    if config.cluster > 1 and config.multicast == "b":
        raise ValueError(f"config: neighbouring row tiles may be of two groups, which share no b, got {config}")
    a, b = pad_operand(a, rows=ROWS), pad_operand(b, rows=64)

    most = -(-rows // config.tile_m)
    tiles = (jnp.clip(counts, 0, rows).astype(jnp.int32) + config.tile_m - 1) // config.tile_m
    end = running_sum(tiles)
    index = jnp.arange(groups * most, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(index[:, None] >= end[None, :], axis=1, dtype=jnp.int32), groups - 1)
    tile = index - (end - tiles)[group]
    valid = jnp.clip(counts[group] - tile * config.tile_m, 0, config.tile_m)
    table = Table.of(Unit(tile * (config.tile_m // ROWS), valid, group, 0, num_blocks(k)), end[-1])

    out_type = jax.ShapeDtypeStruct((groups, a.shape[1], b.shape[1]), out_dtype)
    problem = Problem(cols=n, out_type=out_type, grouped=("a", "b", "out"), partial=True)
    return gemm(config, problem, Scaled(b.kind), Scaled.arrays(a, b), table=table, num_sms=num_sms, interpret=interpret)[:, :rows, :n]
