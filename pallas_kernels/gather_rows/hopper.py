"""Rows by TMA: a CTA loads some rows, each by a copy of its own, and stores them as one block. No value passes through a register.

A row is seen as [D/128, 128], because one side of a TMA copy is at most 256 long. A row outside
of the matrix is filled with zeros. Several CTAs share an SM and hide each other's latency.
"""

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized import BLOCK, num_blocks, pad_to

CTA_BYTES = 56 * 1024  # of rows: four CTAs to an SM
MOST_ROWS = 32


def gather_rows(index, *parts, columns=None, interpret=None):
    tokens, dtype, (rows,) = len(parts[0]), parts[0].dtype, index.shape
    width = columns or parts[0].shape[1]
    taken = [num_blocks(width)] if len(parts) == 1 else [num_blocks(part.shape[1]) for part in parts]
    ends = np.cumsum(taken).tolist()
    blocks = ends[-1]
    per_cta = max(1, min(MOST_ROWS, CTA_BYTES // (blocks * BLOCK * dtype.itemsize)))
    ctas = -(-rows // per_cta)
    padded = [pad_to(part, (tokens, num_blocks(part.shape[1]) * BLOCK)).reshape(tokens, -1, BLOCK) for part in parts]
    index = pad_to(index, (ctas * per_cta,))

    def body(index, *refs):
        *parts, out, smem, loaded = refs
        first = lax.axis_index("rows") * per_cta
        for i in range(per_cta):
            for part, count, end in zip(parts, taken, ends):
                plgpu.copy_gmem_to_smem(part.at[index[first + i], pl.ds(0, count)], smem.at[i, pl.ds(end - count, count)], loaded)
        plgpu.barrier_wait(loaded)
        plgpu.copy_smem_to_gmem(smem, out.at[pl.ds(first, per_cta)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, blocks, BLOCK), dtype),
        scratch_types=[plgpu.SMEM((per_cta, blocks, BLOCK), dtype), plgpu.Barrier(num_arrivals=per_cta * len(parts))],
        grid=(ctas,),
        grid_names=("rows",),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
    )(index, *padded)
    return out.reshape(rows, blocks * BLOCK)[:, : width if len(parts) == 1 else None]
