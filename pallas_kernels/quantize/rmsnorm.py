"""RMSNorm and quantise on Hopper, in one pass over memory: a CTA keeps whole rows in SMEM, first for their norms, then for their codes.

Several CTAs share an SM and hide each other's loads: eight rows each where three fit, else four.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import SMEM_BYTES
from pallas_kernels.quantize.reference import AMAX_FLOOR
from pallas_kernels.quantize.registers import quantize_registers
from pallas_kernels.quantized import BLOCK, E4M3, Quantized, num_blocks, pad_to
from pallas_kernels.store import store

WARPGROUPS = 4  # each takes every fourth block of 128 columns
LAYOUTS = {  # by rows: a warp takes two rows, 16 lanes to a row and eight neighbours to a lane, or one row, four neighbours to a lane
    8: plgpu.Layout.TILED(plgpu.Tiling(((8, BLOCK), (2, BLOCK), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1),
    4: plgpu.Layout.TILED(plgpu.Tiling(((4, BLOCK), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1),
}


def fits(x) -> bool:
    """Whether an SM can hold some whole rows of x."""
    return min(LAYOUTS) * _row_bytes(x) <= SMEM_BYTES - 1024


def _row_bytes(x):
    return num_blocks(x.shape[-1]) * BLOCK * x.dtype.itemsize


def rmsnorm_quantize_rows(x, weight, *, eps, pow2, interpret):
    """x [M, K], of rows that fit."""
    rows, k = x.shape
    tile_rows = 8 if 3 * 8 * _row_bytes(x) < SMEM_BYTES - 3 * 1024 else 4
    layout = LAYOUTS[tile_rows]
    blocks, padded_rows = num_blocks(k), -(-rows // tile_rows) * tile_rows
    x = pad_to(x, (padded_rows, blocks * BLOCK)).reshape(padded_rows, blocks, BLOCK)
    weight = pad_to(weight.astype(jnp.float32), (blocks * BLOCK,)).reshape(blocks, BLOCK)

    def body(x, weight, values, scales, smem):
        warpgroup, rows = lax.axis_index("warpgroup"), pl.ds(lax.axis_index("row") * tile_rows, tile_rows)
        mine = (blocks - warpgroup + WARPGROUPS - 1) // WARPGROUPS
        pl.when(warpgroup == 0)(lambda: plgpu.copy_gmem_to_smem(x.at[rows], smem["rows"], smem["loaded"]))
        plgpu.barrier_wait(smem["loaded"])

        def read(i):
            block = i * WARPGROUPS + warpgroup
            return block, plgpu.load(smem["rows"].at[:, block], layout=layout, optimized=False).astype(jnp.float32)

        def add_squares(i, squares):
            _, tile = read(i)
            return squares + tile * tile

        squares = lax.fori_loop(0, mine, add_squares, plgpu.layout_cast(jnp.zeros((tile_rows, BLOCK), jnp.float32), layout))
        smem["squares"].at[warpgroup][...] = jnp.sum(squares, axis=1)
        plgpu.barrier_arrive(smem["summed"])
        plgpu.barrier_wait(smem["summed"])
        squares = [plgpu.load(smem["squares"].at[i], layout=layout.reduce(1), optimized=False) for i in range(WARPGROUPS)]
        norm = lax.rsqrt(sum(squares) / k + eps)

        @pl.loop(0, mine)
        def _(i):
            block, tile = read(i)
            factor = plgpu.load(weight.at[block], layout=layout.reduce(0), optimized=False)
            tile *= plgpu.layout_cast(lax.broadcast_in_dim(norm, tile.shape, [0]), layout)
            tile *= plgpu.layout_cast(lax.broadcast_in_dim(factor, tile.shape, [1]), layout)
            (codes,), scale = quantize_registers([tile], layout, pow2=pow2, floor=AMAX_FLOOR, interpret=interpret)
            store(values.at[rows, pl.ds(block * BLOCK, BLOCK)], codes.astype(E4M3))
            store(scales.at[block, rows], scale)

    values, scales = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((padded_rows, blocks * BLOCK), E4M3),
            jax.ShapeDtypeStruct((blocks, padded_rows), jnp.float32),
        ),
        scratch_types=[
            {
                "rows": plgpu.SMEM((tile_rows, blocks, BLOCK), x.dtype),
                "squares": plgpu.SMEM((WARPGROUPS, tile_rows), jnp.float32),
                "loaded": plgpu.Barrier(),
                "summed": plgpu.Barrier(num_arrivals=WARPGROUPS),
            }
        ],
        grid=(padded_rows // tile_rows,),
        grid_names=("row",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        interpret=interpret,
        # Layouts as they are written here: inferred ones swizzle the rows, and a block of 128 columns does not begin where a swizzle does.
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, weight)
    return Quantized(values[:rows, :k], scales[:, :rows], "tiles")
