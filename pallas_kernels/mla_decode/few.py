"""MLA decode over FP8 pages for few rows (heads times new tokens): tokens take the place of rows in the products.

WGMMA has 64 rows, whatever is wanted of them. Here they are the tokens of a page, and the queries are its columns:

    S^T [64 tokens, rows] = K Q^T        O^T [512, rows] += V^T P^T

so that the queries take a quarter of the shared memory that they take in `hopper.py`, O^T fits one warpgroup, and there is room for
FP8 pages to arrive while others are dequantised:

  warpgroup 0     computes
  warpgroup 1, 2  dequantise the left and the right half of a page
  warpgroup 3     loads queries, and FP8 pages into a ring
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.mosaic.gpu.fragmented_array import optimization_barrier
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels.mla_decode.cache import LATENT, PAGE_SIZE, ROPE, TILE
from pallas_kernels.mla_decode.merge import FINITE_MIN, LOG2E
from pallas_kernels.mla_decode.schedule import BLOCK, num_blocks
from pallas_kernels.store import store

MAX_ROWS = 32
STAGES = {16: 3, 32: 2}  # FP8 pages in shared memory, by rows
REGISTERS = {16: (168, 160, 24), 32: (192, 144, 24)}  # of a thread that computes, dequantises, loads, by rows
HALF = LATENT // 2
CHUNK = 16  # tokens that are dequantised at a time
SWIZZLED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


def _by_rows(rows, columns, rows_of_a_warp, vector):
    tiling = plgpu.Tiling(((rows, columns), (rows_of_a_warp, columns), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


# Of codes [64, 128]: a warp takes two rows, 16 lanes to a row, eight neighbours to a lane; of RoPE values [64, 64]: four rows, 8 lanes.
CODES = _by_rows(8, TILE, 2, 8)
VALUES = _by_rows(16, ROPE, 4, 8)
BY_ROW = plgpu.Layout.WGMMA.reduce(0)  # one value for each column of S^T


def padded_rows(rows: int) -> int:
    return 16 if rows <= 16 else 32


def attend(q, views, page_table, lengths, bounds, *, scale, num_queries, heads, out_dtype, interpret):
    """q [B, padded rows, 576], views: of the FP8 pool, see `hopper._fp8_views`; bounds [parts + 1, 2]: see `schedule.Schedule`.

    Returns out [B, rows, 512] and lse [B, rows] of whole sequences, and of pieces, as `merge` wants them.
    """
    B, rows, _ = q.shape
    num_parts, stages = bounds.shape[0] - 1, STAGES[rows]
    scratch = {
        "q": plgpu.SMEM((1, rows, LATENT + ROPE), jnp.bfloat16, transforms=SWIZZLED),
        "codes": plgpu.SMEM((stages, LATENT // TILE, PAGE_SIZE, TILE), jnp.float8_e4m3fn),
        "scales": plgpu.SMEM((stages, PAGE_SIZE, LATENT // TILE), jnp.float32),
        "rope": plgpu.SMEM((stages, PAGE_SIZE, ROPE), jnp.bfloat16),
        "values": plgpu.SMEM((1, PAGE_SIZE, LATENT + ROPE), jnp.bfloat16, transforms=SWIZZLED),
        "p": plgpu.SMEM((1, rows, PAGE_SIZE), jnp.bfloat16, transforms=SWIZZLED),
        "q_full": plgpu.Barrier(),
        "q_empty": plgpu.Barrier(),
        "page_full": plgpu.Barrier(num_arrivals=LATENT // TILE + 2, num_barriers=stages),
        "page_empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "full": plgpu.Barrier(num_barriers=2),  # halves of `values`
        "empty": plgpu.Barrier(num_barriers=2),
    }
    return plgpu.kernel(
        functools.partial(
            _attend,
            num_queries=num_queries,
            heads=heads,
            scale=scale * LOG2E,
            num_pages=views[0].shape[0],
            stages=stages,
            interpreted=interpret is not None,
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
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=64 * rows,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )(q, page_table, lengths, bounds, *views)


def _keep(words):
    """`optimization_barrier` of bfloat16 registers as 32-bit words in the layout `words`: as they are, it would exchange the words of a
    vector (jax 0.11 and 0.12)."""

    def cast(array, register_type, layout, is_signed):
        registers = np.empty_like(array.registers)
        for i, register in np.ndenumerate(array.registers):
            registers[i] = utils.bitcast(register, register_type)
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)

    def keep(_, x):
        packed = x.registers.flat[0].type
        word = ir.VectorType.get((ir.VectorType(packed).shape[0] // 2,), ir.IntegerType.get_signless(32))
        return cast(optimization_barrier(cast(x, word, words.to_mgpu(), True)), packed, x.layout, None)

    return keep


def _attend(q, table, lengths, bounds, codes, scales, rope, out, lse, partial_out, partial_lse, smem, **options):
    """The kernel. `scale` makes scores logarithms to base 2; all maxima and partial lse are in these units."""
    num_queries, heads, scale, num_pages, stages = (options[name] for name in ("num_queries", "heads", "scale", "num_pages", "stages"))
    interpreted = options["interpreted"]
    rows, half = smem["q"].shape[1], HALF
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

    def over_pages(visit):
        """visit(i, done, sequence, length, page of the sequence), for every page of every segment; done counts the pages."""

        def one_segment(i, done):
            sequence, length, low, high, _ = segment(i)

            def one_page(page, done):
                visit(i, done, sequence, length, page)
                return done + 1

            return lax.fori_loop(low, high, one_page, done)

        return lax.fori_loop(0, num_segments, one_segment, jnp.int32(0))

    def zero(count):
        """0 in a form that the compiler cannot see through: see `hopper.py`, `indices`."""
        return lax.shift_right_logical(count, 31)

    def wait_if(condition, barrier):
        pl.when(condition)(lambda: plgpu.barrier_wait(barrier))

    # ---- warpgroup 0 ----

    def page_step(o, length, page, carry):
        m, total = carry
        q, values, p_smem = (smem[name].at[zero(page)] for name in ("q", "values", "p"))

        def product(acc):
            for side, columns in enumerate((pl.ds(0, half), pl.ds(half, half + ROPE))):
                plgpu.barrier_wait(smem["full"].at[side])
                plgpu.wgmma(acc, values.at[:, columns], q.at[:, columns].transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(product, plgpu.ACC((PAGE_SIZE, rows))) * scale
        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA) + page * PAGE_SIZE
        limit = length - num_queries + 1  # query i sees the keys below limit + i
        if num_queries > 1:
            limit += lax.div(plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA), heads)
        s = jnp.where(key < limit, s, -jnp.inf)
        new_m = jnp.maximum(m, jnp.max(s, axis=0))
        alpha = jnp.exp2(m - new_m)
        p = jnp.exp2(s - lax.broadcast_in_dim(new_m, s.shape, [1]))
        p_smem.transpose((1, 0))[...] = plgpu.layout_cast(p.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        for ref in o:
            ref[...] = ref[...] * lax.broadcast_in_dim(alpha, (half, rows), [1])
        for side, ref in enumerate(o):
            plgpu.wgmma(ref, values.at[:, pl.ds(side * half, half)].transpose((1, 0)), p_smem.transpose((1, 0)))
        for side in range(2):
            plgpu.wgmma_wait(1 - side)
            plgpu.barrier_arrive(smem["empty"].at[side])
        return new_m, total * lax.broadcast_in_dim(alpha, s.shape, [1]) + p

    def compute():
        plgpu.set_max_registers(REGISTERS[rows][0], action="increase")

        @pl.loop(0, num_segments)
        def _(i):
            sequence, length, low, high, whole = segment(i)
            plgpu.barrier_wait(smem["q_full"])

            def attend(*o):
                zeros = plgpu.layout_cast(jnp.zeros((PAGE_SIZE, rows), jnp.float32), plgpu.Layout.WGMMA)
                carry = plgpu.layout_cast(jnp.full((rows,), FINITE_MIN, jnp.float32), BY_ROW), zeros
                m, total = lax.fori_loop(low, high, functools.partial(page_step, o, length), carry)
                total = jnp.sum(total, axis=0)
                inverse = lax.broadcast_in_dim(jnp.where(total > 0, 1 / total, 0), (half, rows), [1])
                return [ref[...] * inverse for ref in o], m + jnp.log2(total)

            halves, log_sum = pl.run_scoped(attend, *(plgpu.ACC((half, rows)) for _ in range(2)))
            plgpu.barrier_arrive(smem["q_empty"])

            def write(ref, lse_ref, log_sum):
                for side, value in enumerate(halves):
                    value = plgpu.layout_cast(value.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                    store(ref.at[:, pl.ds(side * half, half)].transpose((1, 0)), value)
                store(lse_ref, log_sum)

            slot = 2 * part + (i > 0).astype(jnp.int32)
            natural = jnp.where(log_sum > -jnp.inf, log_sum / LOG2E, jnp.inf)
            pl.when(whole)(lambda: write(out.at[sequence], lse.at[sequence], natural))
            pl.when(jnp.logical_not(whole))(lambda: write(partial_out.at[slot], partial_lse.at[slot], log_sum))

    # ---- warpgroups 1 and 2 ----

    def now(x, layout):
        """x, loaded and computed before the next arrival or wait. Loads are not ordered against an arrival, after which TMA may overwrite
        what they read; and rounding behind a wait keeps twice as many registers until then."""
        if interpreted:
            return x
        words = _by_rows(*((8, TILE // 2, 2, 4) if layout is CODES else (16, ROPE // 2, 4, 4)))
        return plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout))(_keep(words))(x)

    def dequantise(side):
        plgpu.set_max_registers(REGISTERS[rows][1], action="increase")

        def one_page(i, done, sequence, length, page):
            stage = lax.rem(done, stages)
            used = length - page * PAGE_SIZE  # what lies behind may be NaN, and NaN * 0 is NaN
            plgpu.barrier_wait(smem["page_full"].at[stage])
            values = []
            for tile, start in itertools.product(range(side * half // TILE, (side + 1) * half // TILE), range(0, PAGE_SIZE, CHUNK)):
                chunk = pl.ds(start, CHUNK)
                x = plgpu.load(smem["codes"].at[stage, tile, chunk], layout=CODES, optimized=False).astype(jnp.float32)
                factor = plgpu.load(smem["scales"].at[stage, chunk, tile], layout=CODES.reduce(1), optimized=False)
                x *= plgpu.layout_cast(lax.broadcast_in_dim(factor, x.shape, [0]), CODES)
                values.append((start, pl.ds(tile * TILE, TILE), now(x.astype(jnp.bfloat16), CODES), CODES))
            if side == 1:
                x = plgpu.load(smem["rope"].at[stage], layout=VALUES, optimized=False)
                values.append((0, pl.ds(LATENT, ROPE), now(x, VALUES), VALUES))
            plgpu.barrier_arrive(smem["page_empty"].at[stage])
            wait_if(done > 0, smem["empty"].at[side])

            def write(change):
                for start, columns, x, layout in values:
                    smem["values"].at[zero(done), pl.ds(start, x.shape[0]), columns][...] = change(x, start, layout)

            def clear(x, start, layout):
                row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout) + start
                return jnp.where(row < used, x, jnp.zeros_like(x))

            write(lambda x, *_: x)
            pl.when(used < PAGE_SIZE)(lambda: write(clear))
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["full"].at[side])

        done = over_pages(one_page)
        wait_if(done > 0, smem["empty"].at[side])  # nothing may arrive at a barrier of a block that has ended

    # ---- warpgroup 3 ----

    def load():
        plgpu.set_max_registers(REGISTERS[rows][2], action="decrease")

        def one_page(i, done, sequence, length, page):
            first = page == segment(i)[2]
            wait_if(first & (i > 0), smem["q_empty"])
            pl.when(first)(lambda: plgpu.copy_gmem_to_smem(q.at[sequence], smem["q"].at[0], smem["q_full"]))
            stage = lax.rem(done, stages)
            where = jnp.clip(table[sequence, page], 0, num_pages - 1)
            full = smem["page_full"].at[stage]
            wait_if(done >= stages, smem["page_empty"].at[stage])
            for tile in range(LATENT // TILE):
                plgpu.copy_gmem_to_smem(codes.at[where, :, pl.ds(tile * TILE, TILE)], smem["codes"].at[stage, tile], full)
            plgpu.copy_gmem_to_smem(scales.at[where, :, pl.ds(LATENT // 4, LATENT // TILE)], smem["scales"].at[stage], full)
            plgpu.copy_gmem_to_smem(rope.at[where, :, pl.ds((LATENT + 16) // 2, ROPE)], smem["rope"].at[stage], full)

        done = over_pages(one_page)
        wait_if(num_segments > 0, smem["q_empty"])
        for i in range(1, stages + 1):
            wait_if(done >= i, smem["page_empty"].at[lax.rem(done - i + stages, stages)])

    pl.when(warpgroup == 0)(compute)
    pl.when(warpgroup == 1)(lambda: dequantise(0))
    pl.when(warpgroup == 2)(lambda: dequantise(1))
    pl.when(warpgroup == 3)(load)
