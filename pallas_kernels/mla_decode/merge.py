"""The second kernel of MLA decode on Hopper: joins the pieces of the sequences that were split, one thread block for eight rows."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.store import store

ROWS = 8
LOG2E = math.log2(math.e)
FINITE_MIN = -1e30  # a running maximum before any key: -inf - -inf would be NaN


def merge(out, lse, partial_out, partial_lse, pieces, *, interpret=None):
    """Fills in the sequences of several pieces and leaves the others as they are.

    out [B, rows, 512] and lse [B, rows] float32, natural; partial_out [slots, rows, 512] and partial_lse [slots, rows] float32, to
    base 2, -inf where a piece has no key for a row; pieces [B, 2] as in `schedule.Schedule`. Returns (out, lse), updated in place.
    """
    B, rows, _ = out.shape
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    plgpu.kernel(
        _merge,
        grid=(rows // ROWS, B),
        grid_names=("rows", "sequence"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(partial_out, partial_lse, pieces, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)


def _merge(partial_gmem, partial_lse_gmem, pieces_gmem, out_gmem, lse_gmem):
    sequence = lax.axis_index("sequence")
    count, first_slot = pieces_gmem[sequence, 0], pieces_gmem[sequence, 1]
    rows = [lax.axis_index("rows") * ROWS + i for i in range(ROWS)]
    width = out_gmem.shape[-1]
    layout = plgpu.Layout.WG_STRIDED((width,), 4)

    def add_piece(i, carry):
        slot = jnp.where(i == 0, first_slot, 2 * (first_slot // 2 + i))
        merged = []
        for row, (m, total, acc) in zip(rows, carry):
            lse = partial_lse_gmem[slot, row]
            new_m = jnp.maximum(m, lse)
            old, new = jnp.exp2(m - new_m), jnp.exp2(lse - new_m)
            acc = acc * old + plgpu.load(partial_gmem.at[slot, row], layout=layout) * new
            merged.append((new_m, total * old + new, acc))
        return tuple(merged)

    @pl.when(count > 1)
    def _():
        zeros = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        carry = (jnp.float32(FINITE_MIN), jnp.float32(0), zeros)
        for row, (m, total, acc) in zip(rows, lax.fori_loop(0, count, add_piece, (carry,) * ROWS)):
            scale = jnp.where(total > 0, 1 / total, 0.0)
            store(out_gmem.at[sequence, row], (acc * scale).astype(out_gmem.dtype))
            lse_gmem[sequence, row] = jnp.where(total > 0, (m + jnp.log2(total)) / LOG2E, jnp.inf)
