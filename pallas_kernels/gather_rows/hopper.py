"""Rows by TMA: a CTA loads some rows, each by a copy of its own, and stores them as one block. No value passes through a register.

A row is seen as [D/128, 128], because one side of a TMA copy is at most 256 long. A row outside
of the matrix is filled with zeros. Several CTAs share an SM and hide each other's latency.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized import BLOCK, num_blocks, pad_to

CTA_BYTES = 56 * 1024  # of rows: four CTAs to an SM
MOST_ROWS = 32


def gather_rows(x, index, *, interpret=None):
    (tokens, width), (rows,) = x.shape, index.shape
    blocks = num_blocks(width)
    per_cta = max(1, min(MOST_ROWS, CTA_BYTES // (blocks * BLOCK * x.dtype.itemsize)))
    ctas = -(-rows // per_cta)
    x = pad_to(x, (tokens, blocks * BLOCK)).reshape(tokens, blocks, BLOCK)
    index = pad_to(index, (ctas * per_cta,))

    def body(x, index, out, smem, loaded):
        first = lax.axis_index("rows") * per_cta
        for i in range(per_cta):
            plgpu.copy_gmem_to_smem(x.at[index[first + i]], smem.at[i], loaded)
        plgpu.barrier_wait(loaded)
        plgpu.copy_smem_to_gmem(smem, out.at[pl.ds(first, per_cta)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, blocks, BLOCK), x.dtype),
        scratch_types=[plgpu.SMEM((per_cta, blocks, BLOCK), x.dtype), plgpu.Barrier(num_arrivals=per_cta)],
        grid=(ctas,),
        grid_names=("rows",),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
    )(x, index)
    return out.reshape(rows, blocks * BLOCK)[:, :width]
