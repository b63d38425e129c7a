"""Transpose and quantise along the tokens on Hopper: `requantize_transposed`, and the second half of `quantize_both`.

A CTA takes 128 tokens of 128 columns. SMEM can hand 16-bit elements to the registers transposed, 8-bit ones not, so codes pass through
float16, which holds every e4m3 number exactly. Groups begin at any row: a table on the device says which rows a tile of tokens has.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import swizzled
from pallas_kernels.quantize.divide import exact_divide_on
from pallas_kernels.quantize.reference import padded_starts, padded_tokens, tile_scales
from pallas_kernels.quantized import BLOCK, E4M3, Quantized, num_blocks, pad_to

HALF = BLOCK // 2  # columns of a warpgroup, and tokens of a staged copy
LAYOUT = plgpu.Layout.WGMMA  # [columns, tokens]


def transpose_quantize(x, scales, group_sizes, *, pow2, interpret):
    """x [T, K] of 16 bits, or e4m3 codes with their scales [K/128, T] -> tiles [K, T']."""
    tokens, k = x.shape
    blocks = num_blocks(k)
    x = pad_to(x, (tokens, blocks * BLOCK))
    middle = jnp.float16 if x.dtype == E4M3 else x.dtype
    table = _token_tiles(tokens, group_sizes)
    # scales are read past the end of a group, and so past the end of the array
    operands = [table, x] + ([] if scales is None else [pad_to(scales, (blocks, -(-tokens // 4) * 4 + BLOCK))])

    def body(table, x, *refs):
        *scales, values, out_scales, x_smem, middle_smem, values_smem, scales_smem, factors_smem, loaded, exchanged = refs
        tile, block, warpgroup = lax.axis_index("tokens"), lax.axis_index("block"), lax.axis_index("wg")
        first, count = table[tile, 0], table[tile, 1]

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_gmem_to_smem(x.at[pl.ds(first, BLOCK), pl.ds(block * BLOCK, BLOCK)], x_smem, loaded.at[0])
            for ref in scales:  # by TMA, which takes any first row: a group may begin at an odd one
                plgpu.copy_gmem_to_smem(ref.at[block, pl.ds(first, BLOCK)], factors_smem, loaded.at[0])

        plgpu.barrier_wait(loaded.at[0])
        middle_smem[warpgroup] = plgpu.load(x_smem.at[pl.ds(warpgroup * HALF, HALF)], layout=LAYOUT, optimized=False).astype(middle)
        plgpu.commit_smem()
        plgpu.barrier_arrive(exchanged.at[0])
        plgpu.barrier_wait(exchanged.at[0])

        halves = []
        for half in range(2):
            source = middle_smem.at[half, :, pl.ds(warpgroup * HALF, HALF)].transpose((1, 0))
            part = plgpu.layout_cast(plgpu.load(source, layout=plgpu.Layout.WGMMA_TRANSPOSED), LAYOUT).astype(jnp.float32)
            if scales:
                factor = plgpu.load(factors_smem.at[pl.ds(half * HALF, HALF)], layout=LAYOUT.reduce(0), optimized=False)
                part *= lax.broadcast_in_dim(factor, part.shape, [1])
            token = plgpu.broadcasted_iota(jnp.int32, part.shape, 1, layout=LAYOUT) + half * HALF
            halves.append(jnp.where(token < count, part, 0.0))

        amax = jnp.maximum(*(jnp.max(jnp.abs(part), axis=1) for part in halves))
        scale = tile_scales(amax, pow2=pow2, divide=exact_divide_on(LAYOUT.reduce(1), interpret))
        scales_smem[warpgroup] = scale
        for half, part in enumerate(halves):
            spread = lax.broadcast_in_dim(scale, part.shape, [0])
            values_smem[warpgroup, half] = exact_divide_on(LAYOUT, interpret)(part, spread).astype(E4M3)
        plgpu.commit_smem()
        rows = pl.ds(block * BLOCK + warpgroup * HALF, HALF)
        for half in range(2):
            plgpu.copy_smem_to_gmem(values_smem.at[warpgroup, half], values.at[rows, pl.ds(tile * BLOCK + half * HALF, HALF)])
        plgpu.copy_smem_to_gmem(scales_smem.at[warpgroup], out_scales.at[tile, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiles = table.shape[0]
    values, out_scales = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((blocks * BLOCK, tiles * BLOCK), E4M3),
            jax.ShapeDtypeStruct((tiles, blocks * BLOCK), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((BLOCK, BLOCK), x.dtype),
            plgpu.SMEM((2, HALF, BLOCK), middle, transforms=swizzled(HALF, middle)),
            plgpu.SMEM((2, 2, HALF, HALF), E4M3, transforms=swizzled(HALF, E4M3)),
            plgpu.SMEM((2, HALF), jnp.float32),
            plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.Barrier(num_arrivals=1 if scales is None else 2, num_barriers=1),
            plgpu.Barrier(num_arrivals=2, num_barriers=1),
        ],
        grid=(tiles, blocks),
        grid_names=("tokens", "block"),
        num_threads=2,
        thread_name="wg",
        interpret=interpret,
    )(*operands)
    return Quantized(values[:k], out_scales[:, :k], "tiles")


def _token_tiles(tokens, group_sizes):
    """int32 [tiles, 2]: for every 128 tokens of the result, the row of x that they begin with, and how many of them there are."""
    if group_sizes is None:
        first = jnp.arange(num_blocks(tokens), dtype=jnp.int32) * BLOCK
        return jnp.stack([first, jnp.minimum(tokens - first, BLOCK)], axis=1)
    sizes = group_sizes.astype(jnp.int32)
    groups = sizes.shape[0]
    starts = padded_starts(sizes)
    position = jnp.arange(padded_tokens(tokens, groups) // BLOCK, dtype=jnp.int32) * BLOCK
    group = jnp.sum(position[:, None] >= starts[None, 1:], axis=1, dtype=jnp.int32)
    safe = jnp.minimum(group, groups - 1)
    offset = position - starts[safe]
    count = jnp.where(group < groups, jnp.clip(sizes[safe] - offset, 0, BLOCK), 0)
    return jnp.stack([jnp.where(count > 0, (jnp.cumsum(sizes) - sizes)[safe] + offset, 0), count], axis=1)
