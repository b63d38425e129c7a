"""Quantise along the tokens on Hopper, in one pass: `requantize_transposed`, and `quantize_both`, which quantises along the rows as well.

A CTA takes 128 tokens of 128 columns, loads them once, and writes both layouts of them. Groups begin at any row: a table on the device
says which rows a tile of tokens has. What follows them in the tile is another group's; it is written by rows too, the same as by its own
CTA.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import swizzled
from pallas_kernels.quantize.reference import padded_starts, padded_tokens
from pallas_kernels.quantize.registers import COLUMNS, load_transposed, quantize_registers, rows_layout
from pallas_kernels.quantized import BLOCK, E4M3, Quantized, num_blocks, pad_to
from pallas_kernels.store import store

HALF = BLOCK // 2  # rows, or columns, that are in registers at a time
HALVES = pl.ds(0, HALF), pl.ds(HALF, HALF)


def quantize_by_tokens(x, scales, group_sizes, *, pow2, floor, interpret):
    """x [T, K], or e4m3 codes with their scales [K/128, T], -> (tiles [T, K] of x, None for codes; tiles [K, T'])."""
    tokens, k = x.shape
    blocks, both = num_blocks(k), scales is None
    x = pad_to(x, (tokens, blocks * BLOCK))
    table, room = token_tiles(tokens, group_sizes), rows_touched(tokens, group_sizes)
    tiles = table.shape[0]
    operands = [table, x] if both else [table, x, pad_to(scales, (blocks, room))]
    layout = rows_layout(x.dtype)

    def body(*refs):
        table, x, *source_scales = refs[: len(operands)]
        *by_rows, values, out_scales, smem = refs[len(operands) :]
        tile, block = lax.axis_index("tokens"), lax.axis_index("block")
        first, count = table[tile, 0], table[tile, 1]
        rows, columns = pl.ds(first, BLOCK), pl.ds(block * BLOCK, BLOCK)
        for half in range(2):
            plgpu.copy_gmem_to_smem(x.at[rows, pl.ds(block * BLOCK + half * HALF, HALF)], smem["x"].at[half], smem["loaded"])
        for ref in source_scales:
            for half, start in zip(HALVES, (0, HALF)):
                row = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=layout.reduce(1)) + start
                smem["source_scales"].at[half][...] = jnp.where(row < count, load_rows(ref.at[block], first + start, layout), 0.0)
        plgpu.barrier_wait(smem["loaded"])

        if both:
            for half, start in zip(HALVES, (0, HALF)):
                parts = [plgpu.load(smem["x"].at[i, half], layout=layout).astype(jnp.float32) for i in range(2)]
                parts, scale = quantize_registers(parts, layout, pow2=pow2, floor=floor, interpret=interpret)
                for i, codes in enumerate(parts):
                    smem["rows"].at[i, half][...] = codes.astype(E4M3)
                store(by_rows[1].at[block, pl.ds(first + start, HALF)], scale)
            plgpu.commit_smem()
            for i in range(2):
                plgpu.copy_smem_to_gmem(smem["rows"].at[i], by_rows[0].at[rows, pl.ds(block * BLOCK + i * HALF, HALF)])

        @pl.when(count < BLOCK)
        def _():
            for i in range(2):
                clear_rows(smem["x"].at[i], count, layout)

        for i, half in enumerate(HALVES):
            part = load_transposed(smem["x"].at[i], interpret).astype(jnp.float32)
            for _ in source_scales:
                factor = plgpu.load(smem["source_scales"], layout=COLUMNS.reduce(0), optimized=False)
                part *= lax.broadcast_in_dim(factor, part.shape, [1])
            (codes,), scale = quantize_registers([part], COLUMNS, pow2=pow2, floor=floor, interpret=interpret)
            smem["values"].at[half][...] = codes.astype(E4M3)
            smem["scales"].at[half][...] = scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["values"], values.at[columns, pl.ds(tile * BLOCK, BLOCK)])
        plgpu.copy_smem_to_gmem(smem["scales"], out_scales.at[tile, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = [
        jax.ShapeDtypeStruct((blocks * BLOCK, tiles * BLOCK), E4M3),
        jax.ShapeDtypeStruct((tiles, blocks * BLOCK), jnp.float32),
    ]
    scratch = {
        "x": plgpu.SMEM((2, BLOCK, HALF), x.dtype, transforms=any_row(x.dtype)),
        "values": plgpu.SMEM((BLOCK, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
        "scales": plgpu.SMEM((BLOCK,), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=2),
    }
    if both:
        out_type = [jax.ShapeDtypeStruct(x.shape, E4M3), jax.ShapeDtypeStruct((blocks, room), jnp.float32), *out_type]
        scratch["rows"] = plgpu.SMEM((2, BLOCK, HALF), E4M3, transforms=any_row(E4M3))
    else:
        scratch["source_scales"] = plgpu.SMEM((BLOCK,), jnp.float32)
    *by_rows, values, out_scales = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=[scratch],
        grid=(tiles, blocks),
        grid_names=("tokens", "block"),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
    )(*operands)
    transposed = Quantized(values[:k], out_scales[:, :k], "tiles")
    return Quantized(by_rows[0][:, :k], by_rows[1][:, :tokens], "tiles") if both else None, transposed


def rows_touched(tokens, group_sizes):
    """How long arrays of one value for each row must be: the last tile of a group may go beyond the last row."""
    return num_blocks(tokens) * BLOCK if group_sizes is None else tokens + BLOCK


def load_rows(ref, first, layout):
    """Values [64] of a GMEM ref [T] from any row on, which TMA cannot load: its lines begin at multiples of 16 bytes."""
    return plgpu.load(ref.at[pl.ds(first, HALF)], layout=layout.reduce(1), optimized=False)


def clear_rows(ref, count, layout):
    """Puts zeros into the rows of an SMEM ref [128, 64] that lie past the end of the group."""
    for half, start in zip(HALVES, (0, HALF)):
        row = plgpu.broadcasted_iota(jnp.int32, (HALF, HALF), 0, layout=layout) + start
        kept = jnp.where(row < count, plgpu.load(ref.at[half], layout=layout).astype(jnp.float32), 0.0)
        ref.at[half][...] = kept.astype(ref.dtype)


def any_row(dtype):
    """The SMEM layout of 64 columns that TMA can fill from any row on, and of which rows and columns are read without bank conflicts."""
    dtype = jnp.dtype(dtype)
    line = min(HALF, 128 // dtype.itemsize)
    return plgpu.TilingTransform((1, line)), plgpu.SwizzleTransform(line * dtype.itemsize)


def token_tiles(tokens, group_sizes):
    """int32 [tiles, 2]: for every 128 tokens of the result, the row of x that they begin with, and how many of them there are.

    Tiles past the groups have no tokens; they begin with the rows that no group has, so that those are quantised too.
    """
    if group_sizes is None:
        first = jnp.arange(num_blocks(tokens), dtype=jnp.int32) * BLOCK
        return jnp.stack([first, jnp.minimum(tokens - first, BLOCK)], axis=1)
    sizes = group_sizes.astype(jnp.int32)
    groups = sizes.shape[0]
    starts, ends = padded_starts(sizes), jnp.cumsum(sizes)
    position = jnp.arange(padded_tokens(tokens, groups) // BLOCK, dtype=jnp.int32) * BLOCK
    group = jnp.sum(position[:, None] >= starts[None, 1:], axis=1, dtype=jnp.int32)
    safe = jnp.minimum(group, groups - 1)
    offset = position - starts[safe]
    # There may be many spare tiles, and threads store the scales of all 128 rows of a tile, past the last row of x too.
    spare = jnp.minimum(ends[-1] + position - starts[-1], tokens)
    first = jnp.where(group < groups, (ends - sizes)[safe] + offset, spare)
    count = jnp.where(group < groups, jnp.clip(sizes[safe] - offset, 0, BLOCK), 0)
    return jnp.stack([first, count], axis=1)
