"""The second kernel of MLA decode on Hopper: joins the pieces of the sequences that were split.

A thread block always has `LOADS` loads of a row on their way: of as many rows, where there are many sequences of few pieces, or
of as many pieces of one row, where a few long sequences have many.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.store import store

LOADS = 8
MANY_BLOCKS = 1024  # enough to fill a device with blocks of `LOADS` rows
LOG2E = math.log2(math.e)
FINITE_MIN = -1e30  # a running maximum before any key: -inf - -inf would be NaN


def merge(out, lse, partial_out, partial_lse, pieces, *, interpret=None):
    """Fills in the sequences of several pieces and leaves the others as they are.

    out [B, rows, 512] and lse [B, rows] float32, natural; partial_out [slots, rows, 512] and partial_lse [slots, rows] float32, to
    base 2, -inf where a piece has no key for a row; pieces [B, 2] as in `schedule.Schedule`. Returns (out, lse), updated in place.
    """
    B, rows, _ = out.shape
    rows_at_once = LOADS if B * rows >= LOADS * MANY_BLOCKS else 1
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    plgpu.kernel(
        functools.partial(_merge, rows_at_once=rows_at_once),
        grid=(rows // rows_at_once, B),
        grid_names=("rows", "sequence"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(partial_out, partial_lse, pieces, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)


def _merge(partial_gmem, partial_lse_gmem, pieces_gmem, out_gmem, lse_gmem, *, rows_at_once):
    sequence = lax.axis_index("sequence")
    count, first_slot = pieces_gmem[sequence, 0], pieces_gmem[sequence, 1]
    rows = [lax.axis_index("rows") * rows_at_once + i for i in range(rows_at_once)]
    pieces_at_once = LOADS // rows_at_once
    width = out_gmem.shape[-1]
    layout = plgpu.Layout.WG_STRIDED((width,), 4)

    def add_pieces(i, carry):
        pieces = [i * pieces_at_once + j for j in range(pieces_at_once)]
        slots = [jnp.where((piece == 0) | (piece >= count), first_slot, 2 * (first_slot // 2 + piece)) for piece in pieces]
        merged = []
        for row, (m, total, acc) in zip(rows, carry):
            lses = [jnp.where(piece < count, partial_lse_gmem[slot, row], -jnp.inf) for piece, slot in zip(pieces, slots)]
            values = [plgpu.load(partial_gmem.at[slot, row], layout=layout) for slot in slots]
            new_m = functools.reduce(jnp.maximum, lses, m)
            factor = jnp.exp2(m - new_m)
            total, acc = total * factor, acc * factor
            for lse, value in zip(lses, values):
                factor = jnp.exp2(lse - new_m)
                total, acc = total + factor, acc + value * factor
            merged.append((new_m, total, acc))
        return tuple(merged)

    @pl.when(count > 1)
    def _():
        zeros = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        carry = (jnp.float32(FINITE_MIN), jnp.float32(0), zeros)
        carry = lax.fori_loop(0, pl.cdiv(count, pieces_at_once), add_pieces, (carry,) * rows_at_once)
        for row, (m, total, acc) in zip(rows, carry):
            scale = jnp.where(total > 0, 1 / total, 0.0)
            store(out_gmem.at[sequence, row], (acc * scale).astype(out_gmem.dtype))
            lse_gmem[sequence, row] = jnp.where(total > 0, (m + jnp.log2(total)) / LOG2E, jnp.inf)
