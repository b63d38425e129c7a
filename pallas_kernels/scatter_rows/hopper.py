"""Rows by TMA: a CTA loads some rows and stores each to its places. No value passes through a register.

The last CTAs write the zeros at the end: what they store has been loaded from beyond the end of x.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized import BLOCK, num_blocks, pad_to

CTA_BYTES = 56 * 1024  # of rows: four CTAs to an SM
MOST_PLACES = 64  # of a CTA, which it holds in registers
ZERO_CTAS = 132


def scatter_rows(x, places, filled, *, rows, columns, interpret=None):
    (tokens, copies), blocks = places.shape, num_blocks(columns)
    per_cta = max(1, min(MOST_PLACES // copies, CTA_BYTES // (blocks * BLOCK * x.dtype.itemsize)))
    ctas = -(-tokens // per_cta)
    places = jnp.pad(places, ((0, ctas * per_cta - tokens), (0, 0)), constant_values=rows).reshape(-1)
    x = pad_to(x, (tokens, num_blocks(x.shape[1]) * BLOCK)).reshape(tokens, -1, BLOCK)

    def body(x, places, filled, out, smem, loaded):
        cta = lax.axis_index("rows")
        first = cta * per_cta

        def load(first):
            for i in range(per_cta):
                plgpu.copy_gmem_to_smem(x.at[first + i, pl.ds(0, blocks)], smem.at[i], loaded)
            plgpu.barrier_wait(loaded)

        @pl.when(cta < ctas)
        def _():
            to = [[places[(first + i) * copies + m] for m in range(copies)] for i in range(per_cta)]
            load(first)
            for i in range(per_cta):
                for place in to[i]:

                    @pl.when(place < rows)
                    def _(i=i, place=place):
                        plgpu.copy_smem_to_gmem(smem.at[i], out.at[place])

        @pl.when(cta >= ctas)
        def _():
            load(tokens)
            begin, step = filled[0] + first - ctas * per_cta, ZERO_CTAS * per_cta

            def store(i, _):
                plgpu.copy_smem_to_gmem(smem, out.at[pl.ds(begin + i * step, per_cta)])

            lax.fori_loop(0, jnp.maximum(rows - begin + step - 1, 0) // step, store, None)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, blocks, BLOCK), x.dtype),
        scratch_types=[plgpu.SMEM((per_cta, blocks, BLOCK), x.dtype), plgpu.Barrier(num_arrivals=per_cta)],
        grid=(ctas + ZERO_CTAS,),
        grid_names=("rows",),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
    )(x, places, filled[None])
    return out.reshape(rows, blocks * BLOCK)[:, :columns]
