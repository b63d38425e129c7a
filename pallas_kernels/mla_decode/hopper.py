"""MLA decode on Hopper: a persistent split-KV kernel in Pallas Mosaic GPU. `merge.py` joins the sequences it split.

A thread block holds 64 rows (heads times new tokens) of one sequence in shared memory and streams its pages past them, two at a
time. The 64 x 512 output does not fit the registers of one warpgroup, so two share it, as in FlashMLA's "seesaw":

  warpgroup 0: S0 = Q K0^T, softmax -> P0     O_left  += P0 V0_left,   O_left  += P1 V1_left
  warpgroup 1: S1 = Q K1^T                    O_right += P0 V0_right, softmax -> P1, O_right += P1 V1_right
  warpgroup 2: loads Q and pages; pages of an FP8 pool it also dequantises, in place

so that the tensor cores work for one of them while the other is in its softmax. Shared memory is full (Q and two pages are
221,184 of 232,448 bytes), which is why P0 overwrites the RoPE columns of its own page: only S0 needed them.
"""

import functools

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf

from pallas_kernels.mla_decode import few
from pallas_kernels.mla_decode.cache import LATENT, PAGE_SIZE, ROPE, TILE, latent_width
from pallas_kernels.mla_decode.merge import FINITE_MIN, LOG2E, merge
from pallas_kernels.mla_decode.schedule import BLOCK, make_schedule, num_blocks
from pallas_kernels.platform import device_sms
from pallas_kernels.store import store

ROWS = 64  # of a tile: heads times new tokens, the M of one wgmma
HALF = LATENT // 2  # value columns of one warpgroup
# Sums are rescaled only where a score exceeds the reference of the exponentials by this power of 2. That saves 3 to 6% of the time, but
# costs 1 to 8% where more than LAZY_TILES tiles read the same pages: presumably they drift apart, and L2 has lost a page by then.
SLACK, LAZY_TILES = 8.0, 2
REGISTERS = {"float": (240, 24), "fp8": (216, 72)}  # of a computing and of the loading warpgroup; 2 a + b <= 504
FP8_COLUMNS = 64  # dequantised at a time
WGMMA_OPERAND = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
UPCAST = plgpu.Layout.WGMMA_UPCAST_4X  # eight neighbours a lane
ROW_VECTOR = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of an accumulator


def supports(kv_pages, value_width) -> bool:
    """Whether the kernel takes this pool: bfloat16 or FP8, with the widths of DeepSeek-V3."""
    widths = latent_width(kv_pages) == LATENT + ROPE and value_width == LATENT
    return widths and kv_pages.dtype in (jnp.bfloat16, jnp.uint8)


def mla_decode(q, kv_pages, page_table, lengths, *, softmax_scale, out_dtype, value_width=LATENT, num_sms=None, interpret=None):
    """See `pallas_kernels.mla_decode.mla_decode`. `interpret`: `plgpu.InterpretGPUParams()` runs it on a CPU."""
    fp8 = kv_pages.dtype == jnp.uint8
    B, num_queries, heads, width = q.shape
    rows = num_queries * heads
    tiles, shape = -(-rows // ROWS), (B, num_queries, heads)
    few_rows = fp8 and rows <= few.MAX_ROWS
    padded = few.padded_rows(rows) if few_rows else tiles * ROWS
    q = jnp.pad(q.reshape(B, rows, width).astype(jnp.bfloat16), ((0, 0), (0, padded - rows), (0, 0)))
    lengths = jnp.clip(lengths, 0, page_table.shape[1] * PAGE_SIZE).astype(jnp.int32)
    num_parts = max(1, (num_sms or device_sms()) // tiles)
    schedule = make_schedule(lengths, num_parts=num_parts)
    if few_rows:
        options = dict(scale=softmax_scale, num_queries=num_queries, heads=heads, out_dtype=out_dtype, interpret=interpret)
        results = few.attend(q, kv_pages, page_table, lengths, schedule.bounds, **options)
        out, lse = merge(*results, schedule.pieces, interpret=interpret)
        return out[:, :rows].reshape(*shape, LATENT), lse[:, :rows].reshape(shape)

    half = plgpu.SMEM((2, PAGE_SIZE, HALF), jnp.bfloat16, transforms=WGMMA_OPERAND)
    if fp8:  # The 16 KB of codes land in the 32 KB of their values, at 2 slot; the RoPE values behind them, at 4 slot + 2.
        codes = plgpu.SMEM((4, PAGE_SIZE, HALF), jnp.float8_e4m3fn)
        half = plgpu.RefUnion(half, codes, plgpu.SMEM((8, PAGE_SIZE, ROPE), jnp.bfloat16))
    out, lse, partial_out, partial_lse = plgpu.kernel(
        functools.partial(
            _attend,
            num_queries=num_queries,
            heads=heads,
            scale=softmax_scale * LOG2E,
            num_pages=kv_pages.shape[0],
            lazy=tiles <= LAZY_TILES,
            interpreted=interpret is not None,
        ),
        out_type=(
            jax.ShapeDtypeStruct((B, tiles * ROWS, LATENT), out_dtype),
            jax.ShapeDtypeStruct((B, tiles * ROWS), jnp.float32),
            jax.ShapeDtypeStruct((2 * num_parts, tiles * ROWS, LATENT), jnp.float32),
            jax.ShapeDtypeStruct((2 * num_parts, tiles * ROWS), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=plgpu.SMEM((1, ROWS, LATENT + ROPE), jnp.bfloat16, transforms=WGMMA_OPERAND),
            left_smem=half,
            right_smem=half,
            rope_smem=plgpu.SMEM((2, PAGE_SIZE, ROPE), jnp.bfloat16, transforms=WGMMA_OPERAND),
            p1_smem=plgpu.SMEM((1, ROWS, PAGE_SIZE), jnp.bfloat16, transforms=WGMMA_OPERAND),
            rows_smem=plgpu.SMEM((4, ROWS), jnp.float32),  # running maxima m0, m1 and, at the end, both sums
            q_full=plgpu.Barrier(),
            q_empty=plgpu.Barrier(num_arrivals=2),
            left_full=plgpu.Barrier(num_barriers=2),
            left_empty=plgpu.Barrier(num_barriers=2),
            right_full=plgpu.Barrier(num_arrivals=1 if fp8 else 2, num_barriers=2),
            left_codes_full=plgpu.Barrier(num_barriers=2),  # of FP8 pages
            right_codes_full=plgpu.Barrier(num_arrivals=2, num_barriers=2),
            right0_empty=plgpu.Barrier(num_arrivals=2),  # both warpgroups read P0, which lies in it
            right1_empty=plgpu.Barrier(),
            p_full=plgpu.Barrier(num_barriers=2),
            sums_full=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(num_parts, tiles),  # tiles that read the same pages are neighbours: 2 to 6% faster than apart
        grid_names=("part", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=512,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
    )(q, page_table, lengths, schedule.bounds, *(_fp8_views(kv_pages) if fp8 else (kv_pages,)))
    out, lse = merge(out, lse, partial_out, partial_lse, schedule.pieces, interpret=interpret)
    return out[:, :rows].reshape(*shape, LATENT), lse[:, :rows].reshape(shape)


def _fp8_views(kv_pages):
    """The bytes of an FP8 pool as codes [P, 64, 656], scales [P, 64, 164] and RoPE values [P, 64, 328]: bitcasts, nothing is copied."""
    words = [kv_pages.reshape(*kv_pages.shape[:-1], -1, size) for size in (4, 2)]
    codes = lax.bitcast_convert_type(kv_pages, jnp.float8_e4m3fn)
    return codes, lax.bitcast_convert_type(words[0], jnp.float32), lax.bitcast_convert_type(words[1], jnp.bfloat16)


def _load_untiled(ref):
    """A [64, n] piece of an untiled buffer, in the layout of an upcast. `plgpu.load` would have the buffer tiled, which its copy cannot do:
    the 656 bytes of a row are no multiple of a tile."""
    result = plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout=UPCAST)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def load(ctx, ref):
        del ctx
        return mgpu.FragmentedArray.load_untiled(ref, layout=UPCAST.to_mgpu(), optimized=False)

    return load(ref)


@plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, ROW_VECTOR), return_type=plgpu.ShapeDtypeStruct((ROWS, HALF), jnp.float32, layout=plgpu.Layout.WGMMA)
)
def _scale_if_needed(_, sums, factor):
    """sums * factor. A warp whose 16 factors are all 1 skips the products: most blocks raise no maximum by SLACK."""
    bits = [utils.bitcast(register, ir.IntegerType.get_signless(32)) for register in factor.registers.flat]
    one = mgpu.c(0x3F800000, bits[0].type)
    changed = functools.reduce(arith.ori, (arith.cmpi(arith.CmpIPredicate.ne, x, one) for x in bits))
    changed = nvvm.vote_sync(mgpu.c(0xFFFFFFFF, bits[0].type), changed, "any")
    branch = scf.IfOp(changed, [register.type for register in sums.registers.flat], has_else=True)
    for block, values in (
        (branch.then_block, lambda: sums * factor.broadcast_in_dim((ROWS, HALF), (0,), sums.layout)),
        (branch.else_block, lambda: sums),
    ):
        with ir.InsertionPoint(block):
            scf.yield_(list(values().registers.flat))
    registers = np.array(list(branch.results), object).reshape(sums.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)


def _attend(
    q_gmem,
    table_gmem,
    lengths_gmem,
    bounds_gmem,
    *gmem,
    q_smem,
    left_smem,
    right_smem,
    rope_smem,
    p1_smem,
    rows_smem,
    q_full,
    q_empty,
    left_full,
    left_empty,
    right_full,
    right0_empty,
    right1_empty,
    p_full,
    left_codes_full,
    right_codes_full,
    sums_full,
    num_queries,
    heads,
    scale,
    num_pages,
    lazy,
    interpreted,
):
    """The kernel. `scale` makes scores logarithms to base 2; all maxima and partial lse are in these units."""
    *kv_gmem, out_gmem, lse_gmem, partial_gmem, partial_lse_gmem = gmem
    fp8 = len(kv_gmem) == 3
    tile, part, warpgroup = (lax.axis_index(name) for name in ("tile", "part", "warpgroup"))
    tile_rows = pl.ds(tile * ROWS, ROWS)

    first_sequence, first_block = bounds_gmem[part, 0], bounds_gmem[part, 1]
    last_sequence, last_block = bounds_gmem[part + 1, 0], bounds_gmem[part + 1, 1]
    num_segments = last_sequence - first_sequence + (last_block > 0).astype(jnp.int32)

    def segment(i):
        """The i-th piece of work: (sequence, its length, blocks of it from low to high, whether that is all of it)."""
        sequence = first_sequence + i
        length = lengths_gmem[sequence]
        low = jnp.where(i == 0, first_block, 0)
        high = jnp.where(sequence == last_sequence, last_block, num_blocks(length))
        return sequence, length, low, high, (low == 0) & (high == num_blocks(length))

    if fp8:
        (left_smem, left_codes, _), (right_smem, right_codes, rope_codes) = left_smem, right_smem
        codes_smem = left_codes, right_codes
        codes_full = left_codes_full, right_codes_full
    halves = left_smem, right_smem
    full = left_full, right_full
    empty = (left_empty.at[0], left_empty.at[1]), (right0_empty, right1_empty)

    # ---- warpgroups 0 and 1 ----

    def order(slot):
        """The halves of a page in the order they become free: of page 0 warpgroup 0 is the first to be done with its half, of page 1
        warpgroup 1. They are loaded and multiplied with Q in that order."""
        return (0, 1) if slot == 0 else (1, 0)

    def scores(at, slot, zero):
        def product(acc):
            q = q_smem.at[zero]
            for side in order(slot):
                plgpu.barrier_wait(full[side].at[slot])
                plgpu.wgmma(acc, q.at[:, pl.ds(side * HALF, HALF)], halves[side].at[at].transpose((1, 0)))
                if side == 1:
                    plgpu.wgmma(acc, q.at[:, pl.ds(LATENT, ROPE)], rope_smem.at[at].transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((ROWS, PAGE_SIZE)))

    def mask(s, start, length, zero):
        """-inf where a query must not see a key: query i sees those below length - num_queries + 1 + i."""
        row = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA) + (tile * ROWS + zero)
        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA) + start
        limit = length - num_queries + 1 + (lax.div(row, heads) if num_queries > 1 else 0)
        return jnp.where(key < limit, s, -jnp.inf)

    def clear_unused(values, used):
        """Zeroes the rows of a page behind the sequence's end: they may hold NaN, and NaN * 0 is NaN. FP8 pages were cleared when read."""
        if fp8:
            return

        @pl.when(used < PAGE_SIZE)
        def _():
            for column in range(0, HALF, 64):
                ref = values.at[:, pl.ds(column, 64)]
                x = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
                token = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
                ref[...] = jnp.where(token < used, x, jnp.zeros_like(x))
            plgpu.commit_smem()

    def raised(m, s):
        """The reference of each row, m or what the scores demand instead: their maximum, if it exceeds m at all (by SLACK, if `lazy`)."""
        top = jnp.max(s, axis=1) * scale
        return jnp.where(top > m + SLACK, top, m) if lazy else jnp.maximum(m, top)

    def add_values(o, factor, p, values):
        """Issues O = O * factor + P V."""
        if lazy and not interpreted:
            o[...] = _scale_if_needed(o[...], factor)
        else:
            o[...] = o[...] * lax.broadcast_in_dim(factor, (ROWS, HALF), [0])
        plgpu.wgmma(o, p, values)

    def softmax(s, m, i, p_smem):
        """exp2(s - m) to `p_smem` and m to `rows_smem`, for the other warpgroup. Returns the sums."""
        p = jnp.exp2(s * scale - lax.broadcast_in_dim(m, s.shape, [0]))
        p_smem[...] = p.astype(jnp.bfloat16)
        rows_smem.at[i][...] = m
        plgpu.commit_smem()
        plgpu.barrier_arrive(p_full.at[i])
        return jnp.sum(p, axis=1)

    def read_rows(i):
        return plgpu.load(rows_smem.at[i], layout=ROW_VECTOR)

    def indices(block):
        # 0 and 1, in a form the compiler cannot see through. Constant slots make every wgmma descriptor a loop invariant; some 80
        # of them are then kept in registers and spilled.
        zero = lax.shift_right_logical(block, 31)
        return zero, 1 - zero

    def release_queries(block, high):
        pl.when(block == high - 1)(lambda: plgpu.barrier_arrive(q_empty))

    def hand_back(barrier, block, high):
        """Page 1 of a segment's last block stays with the warpgroups: there they lay out what they have to write."""
        pl.when(block < high - 1)(lambda: plgpu.barrier_arrive(barrier))

    def left_step(o, length, high, masked, block, carry):
        m, total = carry
        zero, one = indices(block)
        used = length - block * BLOCK
        s = scores(zero, 0, zero)
        release_queries(block, high)
        if masked:
            s = mask(s, block * BLOCK, length, zero)
            clear_unused(left_smem.at[zero], used)
        m0 = raised(m, s)
        alpha = jnp.exp2(m - m0)
        total = total * alpha + softmax(s, m0, 0, rope_smem.at[zero])
        add_values(o, alpha, rope_smem.at[zero], left_smem.at[zero])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(left_empty.at[0])
        plgpu.barrier_arrive(right0_empty)

        plgpu.barrier_wait(p_full.at[1])  # then page 1 has landed: only now may its tail be cleared
        if masked:
            clear_unused(left_smem.at[one], used - PAGE_SIZE)
        m1 = read_rows(1)
        alpha = jnp.exp2(m0 - m1)
        add_values(o, alpha, p1_smem.at[zero], left_smem.at[one])
        plgpu.wgmma_wait(0)
        hand_back(left_empty.at[1], block, high)
        return m1, total * alpha

    def right_step(o, length, high, masked, block, carry):
        m, total = carry
        zero, one = indices(block)
        used = length - block * BLOCK
        s = scores(one, 1, zero)
        release_queries(block, high)
        if masked:
            s = mask(s, block * BLOCK + PAGE_SIZE, length, zero)
        plgpu.barrier_wait(p_full.at[0])  # then page 0 has landed, too
        if masked:
            clear_unused(right_smem.at[zero], used)
        m0 = read_rows(0)
        alpha0 = jnp.exp2(m - m0)
        add_values(o, alpha0, rope_smem.at[zero], right_smem.at[zero])  # runs during the softmax below
        m1 = raised(m0, s)
        alpha1 = jnp.exp2(m0 - m1)
        total = total * (alpha0 * alpha1) + softmax(s, m1, 1, p1_smem.at[zero])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(right0_empty)

        if masked:
            clear_unused(right_smem.at[one], used - PAGE_SIZE)
        add_values(o, alpha1, p1_smem.at[zero], right_smem.at[one])
        plgpu.wgmma_wait(0)
        hand_back(right1_empty, block, high)
        return m1, total

    def compute(side, step):
        plgpu.set_max_registers(REGISTERS["fp8" if fp8 else "float"][0], action="increase")
        columns = pl.ds(side * HALF, HALF)

        @pl.loop(0, num_segments)
        def _(i):
            sequence, length, low, high, whole = segment(i)
            plgpu.barrier_wait(q_full)

            def attend(o):
                unmasked = jnp.clip((length - num_queries + 1) // BLOCK, low, high)  # blocks before it are seen whole by every query
                carry = tuple(plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), ROW_VECTOR) for x in (FINITE_MIN, 0))
                carry = lax.fori_loop(low, unmasked, functools.partial(step, o, length, high, False), carry)
                m, total = lax.fori_loop(unmasked, high, functools.partial(step, o, length, high, True), carry)
                rows_smem.at[2 + side][...] = total  # over the keys of this warpgroup's pages only
                plgpu.barrier_arrive(sums_full)
                plgpu.barrier_wait(sums_full)
                total = read_rows(2) + read_rows(3)
                inverse = jnp.where(total > 0, 1 / total, 0)
                return o[...] * lax.broadcast_in_dim(inverse, (ROWS, HALF), [0]), m + jnp.log2(total)

            out, lse = pl.run_scoped(attend, plgpu.ACC((ROWS, HALF)))

            @pl.when(whole)
            def _():
                if out_gmem.dtype == halves[side].dtype:
                    halves[side].at[1][...] = out.astype(out_gmem.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(halves[side].at[1], out_gmem.at[sequence, tile_rows, columns])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                else:
                    store(out_gmem.at[sequence, tile_rows, columns], out)
                if side == 0:
                    lse_gmem.at[sequence, tile_rows][...] = jnp.where(lse > -jnp.inf, lse / LOG2E, jnp.inf)

            @pl.when(jnp.logical_not(whole))
            def _():
                slot = 2 * part + (i > 0).astype(jnp.int32)
                partial_gmem.at[slot, tile_rows, columns][...] = out
                if side == 0:
                    partial_lse_gmem.at[slot, tile_rows][...] = lse

            plgpu.barrier_arrive(empty[side][1])

    # ---- warpgroup 2 ----

    def wait_if(condition, barrier):
        @pl.when(condition)
        def _():
            plgpu.barrier_wait(barrier)

    def load_page(page, slot, reused):
        for side in order(slot):
            wait_if(reused, empty[side][slot])
            plgpu.copy_gmem_to_smem(kv_gmem[0].at[page, :, pl.ds(side * HALF, HALF)], halves[side].at[slot], full[side].at[slot])
            if side == 1:
                plgpu.copy_gmem_to_smem(kv_gmem[0].at[page, :, pl.ds(LATENT, ROPE)], rope_smem.at[slot], full[side].at[slot])

    def load_codes(page, slot, reused):
        """An FP8 page as it is: its scales are read when it is dequantised."""
        for side in order(slot):
            wait_if(reused, empty[side][slot])
            source = kv_gmem[0].at[page, :, pl.ds(side * HALF, HALF)]
            plgpu.copy_gmem_to_smem(source, codes_smem[side].at[2 * slot], codes_full[side].at[slot])
            if side == 1:
                rope = pl.ds((LATENT + 16) // 2, ROPE)  # behind 512 codes and 16 bytes of scales
                plgpu.copy_gmem_to_smem(kv_gmem[2].at[page, :, rope], rope_codes.at[4 * slot + 2], codes_full[side].at[slot])

    def dequantise(page, slot, used):
        """Codes to values, in place: all codes of a half into registers, then its values over them."""
        load = functools.partial(plgpu.load, layout=UPCAST) if interpreted else _load_untiled
        for side in order(slot):
            tiles = range(side * HALF // TILE, (side + 1) * HALF // TILE)
            scales = [plgpu.load(kv_gmem[1].at[page, :, LATENT // 4 + i], layout=UPCAST.reduce(1), optimized=False) for i in tiles]
            plgpu.barrier_wait(codes_full[side].at[slot])
            if side == 1:
                rope_smem.at[slot][...] = load(rope_codes.at[4 * slot + 2])
            columns = [pl.ds(i, FP8_COLUMNS) for i in range(0, HALF, FP8_COLUMNS)]
            codes = [load(codes_smem[side].at[2 * slot, :, c]) for c in columns]
            plgpu.commit_smem()  # all have read what is now overwritten
            for i, c in enumerate(columns):
                values = codes[i].astype(jnp.float32) * lax.broadcast_in_dim(scales[i * FP8_COLUMNS // TILE], codes[i].shape, [0])
                token = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=UPCAST)
                values = values.astype(jnp.bfloat16)
                halves[side].at[slot, :, c][...] = jnp.where(token < used, values, jnp.zeros_like(values))
            plgpu.commit_smem()
            plgpu.barrier_arrive(full[side].at[slot])

    def load():
        plgpu.set_max_registers(REGISTERS["fp8" if fp8 else "float"][1], action="decrease")

        def load_segment(i, done):
            sequence, length, low, high, _ = segment(i)
            last_page = jnp.maximum(length - 1, 0) // PAGE_SIZE
            wait_if(i > 0, q_empty)
            plgpu.copy_gmem_to_smem(q_gmem.at[sequence, tile_rows], q_smem.at[0], q_full)

            def load_block(block, done):
                # An odd last page is loaded twice, masked the second time. Bad entries are clipped into the pool.
                index = [jnp.minimum(2 * block + slot, last_page) for slot in range(2)]
                pages = [jnp.clip(table_gmem[sequence, i], 0, num_pages - 1) for i in index]
                for slot, page in enumerate(pages):
                    (load_codes if fp8 else load_page)(page, slot, done > 0)
                if fp8:
                    for slot, page in enumerate(pages):
                        dequantise(page, slot, length - block * BLOCK - slot * PAGE_SIZE)
                return done + 1

            return lax.fori_loop(low, high, load_block, done)

        done = lax.fori_loop(0, num_segments, load_segment, jnp.int32(0))
        # Nothing may arrive at a barrier of a block that has ended.
        wait_if(num_segments > 0, q_empty)
        for barrier in (*empty[0], *empty[1]):
            wait_if(done > 0, barrier)

    pl.when(warpgroup == 0)(lambda: compute(0, left_step))
    pl.when(warpgroup == 1)(lambda: compute(1, right_step))
    pl.when(warpgroup == 2)(load)
