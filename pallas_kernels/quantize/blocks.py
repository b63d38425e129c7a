"""`quantize_blocks` on Hopper, in one pass over memory: a CTA takes a block of 128x128.

XLA would read the weights twice, once for the scales and once for the codes, and its division on GPUs may be two units off.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import ROWS, swizzled
from pallas_kernels.quantize.reference import block_scales
from pallas_kernels.quantize.registers import divide_on, quotients, rows_layout
from pallas_kernels.quantized import BLOCK, E4M3, Quantized, num_blocks, pad_to

PIECE = BLOCK // 2  # rows that are in registers at a time
PIECES = pl.ds(0, PIECE), pl.ds(PIECE, PIECE)


def quantize_blocks(w, *, pow2=False, interpret=None):
    def run(w):
        return _quantize(w, pow2, interpret)

    for _ in range(w.ndim - 2):
        run = jax.vmap(run)
    return Quantized(*run(w), "blocks")


def _quantize(w, pow2, interpret):
    n, k = w.shape
    w = pad_to(w, (-(-n // ROWS) * ROWS, num_blocks(k) * BLOCK))
    grid, layout = (num_blocks(n), num_blocks(k)), rows_layout(w.dtype)

    def body(w, values, scales, w_smem, values_smem, loaded):
        i, j = lax.axis_index("i"), lax.axis_index("j")
        here = pl.ds(i * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(w.at[*here], w_smem, loaded)
        plgpu.barrier_wait(loaded)

        def load(piece):
            return plgpu.load(w_smem.at[piece], layout=layout).astype(jnp.float32)

        amax = jnp.maximum(*(jnp.max(jnp.abs(load(piece)), axis=1) for piece in PIECES))
        whole = plgpu.layout_cast(lax.broadcast_in_dim(jnp.max(amax), (PIECE,), []), layout.reduce(1))
        # The same for all rows, though XLA, in the interpreter, must not see that: it would divide by a product with a reciprocal.
        scale = block_scales(jnp.maximum(amax, whole), pow2=pow2, divide=divide_on(layout.reduce(1), interpret))
        scales[i, j] = jnp.max(scale)
        for piece in PIECES:
            values_smem.at[piece][...] = quotients(load(piece), scale, layout, interpret).astype(E4M3)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values_smem, values.at[*here])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    values, scales = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(w.shape, E4M3), jax.ShapeDtypeStruct(grid, jnp.float32)),
        scratch_types=[
            plgpu.SMEM((BLOCK, BLOCK), w.dtype, transforms=swizzled(BLOCK, w.dtype)),
            plgpu.SMEM((BLOCK, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
            plgpu.Barrier(),
        ],
        grid=grid,
        grid_names=("i", "j"),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
    )(w)
    return values[:n, :k], scales
