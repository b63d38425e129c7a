"""Rows by TMA: a CTA loads some rows and stores each to its places. No value passes through a register.

The last CTAs write the zeros at the end: what they store has been loaded from beyond the end of a source.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized import BLOCK, num_blocks, pad_to

CTA_BYTES = 56 * 1024  # of rows: four CTAs to an SM
MOST_PLACES = 64  # of a CTA, which it holds in registers
ZERO_CTAS = 132


def scatter_rows(places, filled, *sources, rows, columns, interpret=None):
    (_, copies), dtype, blocks = places.shape, sources[0].dtype, num_blocks(columns)
    per_cta = max(1, min(MOST_PLACES // copies, CTA_BYTES // (blocks * BLOCK * dtype.itemsize)))
    ctas = [-(-len(source) // per_cta) for source in sources]
    ends = np.cumsum(ctas).tolist()
    # Each source's rows fill whole CTAs: there is no place for what is beyond its end.
    starts = np.cumsum([0, *map(len, sources)]).tolist()
    room = [((0, count * per_cta - len(source)), (0, 0)) for count, source in zip(ctas, sources)]
    parts = [jnp.pad(places[start : start + len(x)], pad, constant_values=rows) for start, x, pad in zip(starts, sources, room)]
    places = jnp.concatenate(parts).reshape(-1)
    padded = [pad_to(x, (len(x), num_blocks(x.shape[1]) * BLOCK)).reshape(len(x), -1, BLOCK) for x in sources]

    def body(places, filled, *refs):
        *sources, out, smem, loaded = refs
        cta = lax.axis_index("rows")

        def load(source, first):
            for i in range(per_cta):
                plgpu.copy_gmem_to_smem(source.at[first + i, pl.ds(0, blocks)], smem.at[i], loaded)
            plgpu.barrier_wait(loaded)

        for source, count, end in zip(sources, ctas, ends):

            @pl.when((cta >= end - count) & (cta < end))
            def _(source=source, before=end - count):
                first = cta * per_cta
                to = [[places[(first + i) * copies + m] for m in range(copies)] for i in range(per_cta)]
                load(source, (cta - before) * per_cta)
                for i in range(per_cta):
                    for place in to[i]:

                        @pl.when(place < rows)
                        def _(i=i, place=place):
                            plgpu.copy_smem_to_gmem(smem.at[i], out.at[place])


        @pl.when(cta >= ends[-1])
        def _():
            load(sources[0], sources[0].shape[0])
            first = filled[0] + (cta - ends[-1]) * per_cta
            step = ZERO_CTAS * per_cta

            def store(i, _):
                plgpu.copy_smem_to_gmem(smem, out.at[pl.ds(first + i * step, per_cta)])

            lax.fori_loop(0, jnp.maximum(rows - first + step - 1, 0) // step, store, None)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, blocks, BLOCK), dtype),
        scratch_types=[plgpu.SMEM((per_cta, blocks, BLOCK), dtype), plgpu.Barrier(num_arrivals=per_cta)],
        grid=(ends[-1] + ZERO_CTAS,),
        grid_names=("rows",),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
    )(places, filled[None], *padded)
    return out.reshape(rows, blocks * BLOCK)[:, :columns]
