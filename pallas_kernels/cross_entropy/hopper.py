"""The exponentials of a row of logits stay in SMEM until its log-sum-exp is known, so that memory is read once.

A CTA has a row, in parts of 128 x 32 logits; a thread takes 32 neighbours of each part. Their exponentials, over the largest of the 32, are
kept in bfloat16 beside that maximum, and become the gradient where they are. Two CTAs share an SM: one reads while the other writes.

A target that is likelier than all else is its thread's maximum, whose exponential is 1 exactly: nothing cancels when 1 is subtracted from
its probability.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import swizzled
from pallas_kernels.quantized import BLOCK

OF_THREAD = 32
SHAPE = BLOCK, OF_THREAD  # of a part
PART = BLOCK * OF_THREAD
SLOTS = 2  # of float32 parts
MOST_LOGITS = 9 * PART  # of a row, so that two CTAs share an SM
# A thread has a row.
_ROW_OF_THREAD = plgpu.Layout.TILED(plgpu.Tiling((SHAPE, (32, OF_THREAD), (4,))), warp_dims=(-5,), lane_dims=(-3,), vector_dim=-1)


def supports(logits, dtype) -> bool:
    """Whether the kernel takes rows of this width and makes a gradient of this dtype."""
    return logits.shape[1] % PART == 0 and logits.shape[1] <= MOST_LOGITS and dtype == jnp.bfloat16


def cross_entropy_gradient(logits, targets, weights, *, dtype, interpret=None):
    rows, width = logits.shape
    parts, layout = width // PART, _ROW_OF_THREAD
    targets = lax.optimization_barrier(targets)  # integers are not held apart for every kernel, and these are slices in a loop

    def spread(by_thread):
        return plgpu.layout_cast(lax.broadcast_in_dim(by_thread, SHAPE, [0]), layout)

    def body(logits, targets, weights, gradient, sums, smem, loaded):
        row = lax.axis_index("row")

        def fetch(i):
            slot = lax.rem(i, SLOTS)
            plgpu.copy_gmem_to_smem(logits.at[row, pl.ds(i * BLOCK, BLOCK)], smem["logits"].at[slot], loaded.at[slot])

        for i in range(min(SLOTS, parts)):
            fetch(i)
        target, weight = targets[row], weights[row]

        def read(i, so_far):
            top, total = so_far
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(loaded.at[slot])
            part = plgpu.load(smem["logits"].at[slot], layout=layout)
            part_top = jnp.max(part, axis=1)
            part = jnp.exp(part - spread(part_top))
            smem["values"].at[i][...] = part.astype(jnp.bfloat16)
            smem["tops"].at[i][...] = part_top
            pl.when(i + SLOTS < parts)(lambda: fetch(i + SLOTS))
            new_top = jnp.maximum(top, part_top)
            return new_top, total * jnp.exp(top - new_top) + jnp.sum(part, axis=1) * jnp.exp(part_top - new_top)

        by_thread = lambda value: plgpu.layout_cast(jnp.full((BLOCK,), value, jnp.float32), layout.reduce(1))  # noqa: E731
        top, total = lax.fori_loop(0, parts, read, (by_thread(jnp.finfo(jnp.float32).min), by_thread(0.0)))
        row_top = jnp.max(top)
        lse = row_top + jnp.log(jnp.sum(total * jnp.exp(top - row_top)))

        def write(i, _):
            factor = jnp.exp(plgpu.load(smem["tops"].at[i], layout=layout.reduce(1), optimized=False) - lse) * weight
            part = plgpu.load(smem["values"].at[i], layout=layout).astype(jnp.float32) * spread(factor)
            place = plgpu.broadcasted_iota(jnp.int32, SHAPE, 0, layout=layout) * OF_THREAD
            place += plgpu.broadcasted_iota(jnp.int32, SHAPE, 1, layout=layout)
            part = jnp.where(place == target - i * PART, part - weight, part)
            smem["values"].at[i][...] = part.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["values"].at[i], gradient.at[row, pl.ds(i * BLOCK, BLOCK)])
            return 0

        lax.fori_loop(0, parts, write, 0)
        smem["sum"][...] = jnp.full((BLOCK,), lse, jnp.float32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["sum"], sums.at[row])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    gradient, sums = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, width // OF_THREAD, OF_THREAD), jnp.bfloat16),
            jax.ShapeDtypeStruct((rows, BLOCK), jnp.float32),
        ),
        scratch_types=[
            {
                "logits": plgpu.SMEM((SLOTS, *SHAPE), jnp.float32, transforms=swizzled(OF_THREAD, jnp.float32)),
                "values": plgpu.SMEM((parts, *SHAPE), jnp.bfloat16, transforms=swizzled(OF_THREAD, jnp.bfloat16)),
                "tops": plgpu.SMEM((parts, BLOCK), jnp.float32),
                "sum": plgpu.SMEM((BLOCK,), jnp.float32),
            },
            plgpu.Barrier(num_arrivals=1, num_barriers=SLOTS),
        ],
        grid=(rows,),
        grid_names=("row",),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(logits.reshape(rows, -1, OF_THREAD), targets, weights)
    return gradient.reshape(rows, width), sums[:, 0]
