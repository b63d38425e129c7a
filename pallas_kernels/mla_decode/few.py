"""MLA decode over FP8 pages for few rows (heads times new tokens), by `mma.sync`: nothing dequantised is ever stored.

WGMMA has 64 rows, whatever is wanted of them, and reads keys and values from shared memory, where codes would have to be replaced by
values. `mma.sync` has 16 rows and takes everything from registers: codes become float16, exactly, on their way from shared memory, and
scales are applied outside of the products.

  warpgroup 0, 1  compute. Up to 16 rows they take turns with the pages, up to 32 each has half of the tokens of every page; at the end
                  of a sequence they join what they have, each finishing half of the rows
  warpgroup 2     loads whole pages into a ring

A warp has 128 columns: it multiplies K with its part of q, the partial scores of four warps are added up through shared memory, each
does the softmax, and multiplies P with its columns of V. `few_registers.py` has these steps.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.cache import LATENT, PAGE_SIZE
from pallas_kernels.mla_decode.few_registers import (
    BY_ROW,
    BY_THREAD,
    FRAGMENTS,
    LINES,
    ROWS,
    SCORES,
    SUMS,
    WORDS,
    interpreted_operations,
    operations,
)
from pallas_kernels.mla_decode.merge import FINITE_MIN, LOG2E
from pallas_kernels.mla_decode.schedule import BLOCK, num_blocks
from pallas_kernels.store import store

MAX_ROWS = 2 * ROWS
WORKERS = 2
STAGES = {ROWS: 4, MAX_ROWS: 3}  # FP8 pages in shared memory, by rows; where workers take turns a multiple of their number
REGISTERS = 240, 24  # of a thread that computes, and of one that loads
SMALLEST_SCALE = 2.0**-60  # that a tile is taken to have


def padded_rows(rows: int) -> int:
    return ROWS if rows <= ROWS else MAX_ROWS


def attend(q, kv_pages, page_table, lengths, bounds, *, scale, num_queries, heads, out_dtype, interpret):
    """q [B, padded rows, 576], kv_pages: an FP8 pool; bounds [parts + 1, 2]: see `schedule.Schedule`.

    Returns out [B, rows, 512] and lse [B, rows] of whole sequences, and of pieces, as `merge` wants them.
    """
    B, rows, _ = q.shape
    num_parts = bounds.shape[0] - 1
    stages, tokens = STAGES[rows], PAGE_SIZE * ROWS // rows  # tokens: of a page, that a worker looks at
    words = lax.bitcast_convert_type(kv_pages.reshape(-1, LINES, WORDS, 4), jnp.int32)
    scratch = {
        "page": plgpu.SMEM((stages, LINES, WORDS), jnp.int32),
        "exchange": plgpu.SMEM((WORKERS, rows // 2 * LATENT), jnp.float32),
        "rows": plgpu.SMEM((WORKERS, 64), jnp.float32),
        "page_full": plgpu.Barrier(num_barriers=stages),
        "page_empty": plgpu.Barrier(num_arrivals=rows // ROWS, num_barriers=stages),
        "given": plgpu.Barrier(num_arrivals=WORKERS),
        "taken": plgpu.Barrier(num_arrivals=WORKERS),
    }
    if rows > ROWS:
        scratch |= {
            "queries": plgpu.SMEM((WORKERS, 128 * 4 * FRAGMENTS), jnp.int32),
            "inverse": plgpu.SMEM((WORKERS * ROWS,), jnp.float32),
            "queries_full": plgpu.Barrier(num_arrivals=WORKERS),
        }
    return plgpu.kernel(
        functools.partial(
            _attend,
            do=(operations if interpret is None else interpreted_operations)(rows, tokens),
            rows=rows,
            tokens=tokens,
            num_queries=num_queries,
            heads=heads,
            scale=scale * LOG2E,
        ),
        out_type=(
            jax.ShapeDtypeStruct((B, rows, LATENT), out_dtype),
            jax.ShapeDtypeStruct((B, rows), jnp.float32),
            jax.ShapeDtypeStruct((2 * num_parts, rows, LATENT), jnp.float32),
            jax.ShapeDtypeStruct((2 * num_parts, rows), jnp.float32),
        ),
        scratch_types=[scratch],
        grid=(num_parts,),
        grid_names=("part",),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=512,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )(q, page_table, lengths, bounds, words)


def _attend(q, table, lengths, bounds, pool, out, lse, partial_out, partial_lse, smem, *, do, rows, tokens, num_queries, heads, scale):
    """The kernel. `scale` makes scores logarithms to base 2; all maxima and partial lse are in these units."""
    stages, num_pages = STAGES[rows], pool.shape[0]
    shared = tokens < PAGE_SIZE  # every page, by the workers
    part, warpgroup = lax.axis_index("part"), lax.axis_index("warpgroup")
    first_sequence, first_block = bounds[part, 0], bounds[part, 1]
    last_sequence, last_block = bounds[part + 1, 0], bounds[part + 1, 1]
    num_segments = last_sequence - first_sequence + (last_block > 0).astype(jnp.int32)

    def segment(i):
        """The i-th piece of work: (sequence, its length, pages of it from low to high, whether that is all of it)."""
        sequence = first_sequence + i
        length = lengths[sequence]
        last = jnp.maximum((length + PAGE_SIZE - 1) // PAGE_SIZE, 1)  # a sequence without tokens is one page, all of it masked
        low = jnp.where(i == 0, first_block, 0) * (BLOCK // PAGE_SIZE)
        high = jnp.where((sequence == last_sequence) & (last_block < num_blocks(length)), last_block * (BLOCK // PAGE_SIZE), last)
        return sequence, length, low, high, (low == 0) & (high == last)

    def wait_if(condition, barrier):
        pl.when(condition)(lambda: plgpu.barrier_wait(barrier))

    def by_row(x):
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (rows, tokens), [0]), SCORES)

    def page_step(worker, queries, factor, length, page, done, carry):
        o, m, total, reference = carry
        stage = lax.rem(done, stages)
        this = smem["page"].at[stage]
        used = length - page * PAGE_SIZE
        first = worker * tokens if shared else 0
        zero = lax.shift_right_logical(done, 31)
        plgpu.barrier_wait(smem["page_full"].at[stage])
        pl.when(used < PAGE_SIZE)(lambda: do.clear(this, used))  # what lies behind may be NaN, and NaN * 0 is NaN
        s = do.scores(this, first, smem["exchange"].at[worker], queries) * by_row(factor)
        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=SCORES) + (page * PAGE_SIZE + first)
        limit = length - num_queries + 1  # query i sees the keys below limit + i
        if num_queries > 1:
            limit += lax.div(plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=SCORES), heads)
        s = jnp.where(key < limit, s, -jnp.inf)
        new_m = jnp.maximum(m, jnp.max(s, axis=1))
        alpha = jnp.exp2(m - new_m)
        p = jnp.exp2(s - by_row(new_m))
        total = total * alpha + jnp.sum(p, axis=1)
        o, reference, arrived = do.add_values(this, first, p, o, alpha, reference, zero)
        plgpu.barrier_arrive(smem["page_empty"].at[stage + arrived])
        return o, new_m, total, reference

    def meet(barrier):
        plgpu.barrier_arrive(smem[barrier])
        plgpu.barrier_wait(smem[barrier])

    def compute():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        worker = warpgroup

        def load_queries(sequence):
            if not shared:
                return do.load_queries(q.at[sequence], smem["rows"].at[worker])
            mine = pl.ds(worker * ROWS, ROWS)
            operands, inverse = do.load_queries(q.at[sequence, mine], smem["rows"].at[worker])
            do.share_queries(smem["queries"].at[worker], smem["inverse"].at[mine], operands, inverse)
            meet("queries_full")
            return smem["queries"], plgpu.load(smem["inverse"], layout=BY_ROW, optimized=False)

        def one_segment(i, done):
            sequence, length, low, high, whole = segment(i)
            queries, inverse = load_queries(sequence)
            factor = inverse * scale
            # Pages of this worker: all where it has tokens of its own in each, or those that make `done` even, or odd.
            first, stride = (0, 1) if shared else (lax.rem(done + worker, WORKERS), WORKERS)
            carry = (
                plgpu.layout_cast(jnp.zeros((rows, LATENT), jnp.float32), SUMS),
                plgpu.layout_cast(jnp.full((rows,), FINITE_MIN, jnp.float32), BY_ROW),
                plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), BY_ROW),
                plgpu.layout_cast(jnp.full((128,), SMALLEST_SCALE, jnp.float32), BY_THREAD),
            )

            def step(j, carry):
                offset = first + stride * j
                return page_step(worker, queries, factor, length, low + offset, done + offset, carry)

            o, m, total, reference = lax.fori_loop(0, (high - low - first + stride - 1) // stride, step, carry)
            o = do.to_units(o, reference)
            do.give(smem["exchange"].at[worker], smem["rows"].at[worker], o, m, total, worker)
            meet("given")
            other = 1 - worker
            o, log_sum = do.take(smem["exchange"].at[other], smem["rows"].at[other], o, m, total, worker)

            def write(ref, lse_ref, log_sum):
                half = pl.ds(worker * (rows // 2), rows // 2)
                store(ref.at[half], o.astype(ref.dtype))
                store(lse_ref.at[half], log_sum)

            slot = 2 * part + (i > 0).astype(jnp.int32)
            natural = jnp.where(log_sum > -jnp.inf, log_sum / LOG2E, jnp.inf)
            pl.when(whole)(lambda: write(out.at[sequence], lse.at[sequence], natural))
            pl.when(jnp.logical_not(whole))(lambda: write(partial_out.at[slot], partial_lse.at[slot], log_sum))
            meet("taken")
            return done + high - low

        lax.fori_loop(0, num_segments, one_segment, jnp.int32(0))

    def load():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")

        def one_segment(i, done):
            sequence, _, low, high, _ = segment(i)

            def one_page(page, done):
                stage = lax.rem(done, stages)
                where = jnp.clip(table[sequence, page], 0, num_pages - 1)
                wait_if(done >= stages, smem["page_empty"].at[stage])
                plgpu.copy_gmem_to_smem(pool.at[where], smem["page"].at[stage], smem["page_full"].at[stage])
                return done + 1

            return lax.fori_loop(low, high, one_page, done)

        done = lax.fori_loop(0, num_segments, one_segment, jnp.int32(0))
        for i in range(1, stages + 1):
            wait_if(done >= i, smem["page_empty"].at[lax.rem(done - i + stages, stages)])

    pl.when(warpgroup < WORKERS)(compute)
    pl.when(warpgroup == WORKERS)(load)
