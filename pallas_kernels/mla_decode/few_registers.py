"""What the warps of `few.py` do with registers and shared memory, by `mma.sync`; and the same with arrays, for the interpreter.

A warp has a tile of 128 latent columns, for which a token has one scale, and a quarter of the RoPE columns. In lane 4 g + t of it lie

  q       rows g, g + 8 (+ 16 k); columns 32 t + (0 .. 31), of RoPE 4 t + (0 .. 3)
  scores  rows g, g + 8 (+ 16 k); tokens 8 i + 2 t, 8 i + 2 t + 1; the same in all four warps
  sums    rows g, g + 8 (+ 16 k); columns 32 t + (0 .. 31)

The order of the columns within a product does not matter as long as both operands have the same. So codes are read 16 at a time as they
lie. Rows of 656 bytes begin 16 bytes further in a line of the banks' 128 bytes, each, which leaves no conflicts.
"""

import functools
import types

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mla_decode.cache import FP8_BYTES, LATENT, PAGE_SIZE, ROPE, TILE, decode

ROWS = 16  # of one product
WORDS = 256  # a page is copied as lines of so many words: whole, because rows of 656 bytes begin within sectors of memory
LINES = PAGE_SIZE * FP8_BYTES // 4 // WORDS
SCALES, ROPES = LATENT, LATENT + 4 * (LATENT // TILE)  # where they begin in a row of a page
FRAGMENTS = TILE // 16 + 1  # operands of 16 rows of q in a warp: of codes, and one of RoPE values
HEADROOM = 2.0**15  # of float16 weights

REPLICATED = plgpu.Replicated(4)
SCORES = plgpu.Layout.TILED(plgpu.Tiling(((8, 8), (2,))), warp_dims=(REPLICATED,), lane_dims=(-3, -2), vector_dim=-1)
SUMS = plgpu.Layout.TILED(plgpu.Tiling(((8, LATENT), (8, TILE), (8, 32), (4,))), warp_dims=(-6,), lane_dims=(-3, -4), vector_dim=-1)
BY_ROW = SCORES.reduce(1)
FRAGMENT = plgpu.Layout.WG_STRIDED((128 * 4 * FRAGMENTS,), vec_size=1)
BY_THREAD = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
SCALAR = plgpu.Layout.WG_SPLAT(())
REF = plgpu.RefType()


def operations(rows, tokens):
    """The operations for so many rows, which look at `tokens` of a page at a time."""

    def struct(shape, layout, dtype=jnp.float32):
        return plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)

    sums, half_sums = (struct((n, LATENT), SUMS) for n in (rows, rows // 2))
    by_thread, half_by_row = struct((128,), BY_THREAD), struct((rows // 2,), BY_ROW)
    signatures = {
        load_queries: ((REF, REF), (struct((128 * 4 * FRAGMENTS,), FRAGMENT, jnp.int32), struct((ROWS,), BY_ROW))),
        share_queries: ((REF, REF, FRAGMENT, BY_ROW), None),
        clear: ((REF, SCALAR), None),
        scores: ((REF, SCALAR, REF, FRAGMENT if rows == ROWS else REF), struct((rows, tokens), SCORES)),
        add_values: ((REF, SCALAR, SCORES, SUMS, BY_ROW, BY_THREAD, SCALAR), (sums, by_thread, struct((), SCALAR, jnp.int32))),
        to_units: ((SUMS, BY_THREAD), sums),
        give: ((REF, REF, SUMS, BY_ROW, BY_ROW, SCALAR), None),
        take: ((REF, REF, SUMS, BY_ROW, BY_ROW, SCALAR), (half_sums, half_by_row)),
    }

    def in_registers(operation, arguments, results):
        if operation is scores:
            operation = functools.partial(scores, rows=rows, tokens=tokens)
        return plgpu.inline_mgpu(arg_types=arguments, return_type=results)(operation)

    return types.SimpleNamespace(**{f.__name__: in_registers(f, *signature) for f, signature in signatures.items()})


# ---- instructions ----


def _i32(x=None):
    i32 = ir.IntegerType.get_signless(32)
    return i32 if x is None else mgpu.c(x, i32)


def _f32(x=None):
    return ir.F32Type.get() if x is None else mgpu.c(float(x), ir.F32Type.get())


def _add(*terms):
    return functools.reduce(arith.addi, (_i32(x) if isinstance(x, int) else x for x in terms))


def _mul(x, n):
    return arith.muli(x, _i32(n))


def _thread():
    """(warp of the warpgroup, g, t): lane 4 g + t."""
    thread = arith.remui(utils.thread_idx(), _i32(128))
    lane = arith.remui(thread, _i32(32))
    return arith.divui(thread, _i32(32)), arith.divui(lane, _i32(4)), arith.remui(lane, _i32(4))


def _pointer(base, *offset):
    return utils.getelementptr(base, [_add(*offset)], ir.IntegerType.get_signless(8))


def _shift(pointer, offset):
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _load(pointer, offset, count, element=None):
    """`count` 32-bit elements at a constant offset in bytes."""
    element = element or _i32()
    value = llvm.load(ir.VectorType.get((count,), element), _shift(pointer, offset), alignment=4 * count)
    return [_element(value, i) for i in range(count)]


def _element(x, i):
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _vector(xs):
    value = llvm.mlir_undef(ir.VectorType.get((len(xs),), xs[0].type))
    for i, x in enumerate(xs):
        value = llvm.insertelement(value, x, _i32(i))
    return value


def _store(pointer, offset, xs):
    llvm.store(_vector(xs), _shift(pointer, offset), alignment=4 * len(xs))


def _asm(ptx, results, *args):
    kinds = {"i": ("r", _i32()), "f": ("f", _f32())}
    outs = [kinds[kind] for kind in results]
    constraints = ",".join(["=" + kind for kind, _ in outs] + ["f" if x.type == _f32() else "r" for x in args])
    if len(outs) == 1:
        return llvm.inline_asm(outs[0][1], args, ptx, constraints, has_side_effects=False)
    result = llvm.inline_asm(llvm.StructType.get_literal([t for _, t in outs]), args, ptx, constraints, has_side_effects=False)
    return [llvm.extractvalue(t, result, [i]) for i, (_, t) in enumerate(outs)]


def _halves(codes):
    """Four codes in a word -> two words of two float16."""
    return _asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.rn.f16x2.e4m3x2 $0, lo; cvt.rn.f16x2.e4m3x2 $1, hi; }", "ii", codes)


def _pack(lo, hi):
    return _asm("cvt.rn.f16x2.f32 $0, $2, $1;", "i", lo, hi)


def _prmt(a, b, selector):
    return _asm(f"prmt.b32 $0, $1, $2, {selector};", "i", a, b)


def _mma(kind, c, a, b):
    """c [16, 8] + a [16, 16] b [16, 8]"""
    ptx = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
    return _asm(ptx, "ffff", *a, *b, *c)


def _times(*xs):
    return functools.reduce(arith.mulf, xs)


def _max(a, b):
    return arith.maxnumf(a, b)


def _array(registers, layout, shape):
    layout = layout.to_mgpu()
    registers = np.array(registers, object).reshape(layout.registers_shape(shape))
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _strided(registers, is_signed=None):
    layout = mgpu.WGStridedFragLayout((128 * len(registers),), 1)
    values = np.array([_vector([x]) for x in registers], object)
    return FragmentedArray(_registers=values, _layout=layout, _is_signed=is_signed)


def _scalars(array):
    return [_element(x, 0) for x in array.registers.flat]


# ---- operations ----


def load_queries(_, q, largest):
    """q [16, 576] bfloat16 in memory -> operands of `mma.sync`, each row times a power of 2 so that float16 has it, and what undoes it."""
    warp, g, t = _thread()
    q = _pointer(utils.memref_ptr(q), _mul(g, 2 * (LATENT + ROPE)))
    latent = _pointer(q, _mul(warp, 2 * TILE), _mul(t, 64))
    rope = _pointer(q, 2 * LATENT, _mul(warp, 32), _mul(t, 8))
    below = 8 * 2 * (LATENT + ROPE)
    words = [[x for i in range(4) for x in _load(latent, row * below + 16 * i, 4)] for row in range(2)]
    ropes = [_load(rope, row * below, 2) for row in range(2)]

    def values(word):
        return [utils.bitcast(x, _f32()) for x in (arith.shli(word, _i32(16)), arith.andi(word, _i32(-65536)))]

    largest = utils.memref_ptr(largest)
    from_lane = _pointer(largest, _mul(warp, 4 * ROWS), _mul(g, 4))
    for row in range(2):
        magnitudes = [arith.andi(utils.bitcast(x, _i32()), _i32(0x7FFFFFFF)) for word in words[row] for x in values(word)]
        top = functools.reduce(arith.maxui, magnitudes)
        for distance in (1, 2):
            top = arith.maxui(top, utils.shfl_bfly(top, distance))
        _store(from_lane, 32 * row, [top])
    utils.warpgroup_barrier()
    of_row = _pointer(largest, _mul(g, 4))
    inverse, scaled, scaled_rope = [], [], []
    for row in range(2):
        top = functools.reduce(arith.maxui, (_load(of_row, 4 * ROWS * i + 32 * row, 1)[0] for i in range(4)))
        exponent = arith.maxui(arith.shrui(top, _i32(23)), _i32(15))
        factor = utils.bitcast(arith.shli(arith.subi(_i32(268), exponent), _i32(23)), _f32())  # the largest becomes 2^14 to 2^15
        inverse.append(utils.bitcast(arith.shli(arith.subi(exponent, _i32(14)), _i32(23)), _f32()))
        scaled.append([_pack(*(_times(x, factor) for x in values(word))) for word in words[row]])
        bits = [[utils.bitcast(_times(x, factor), _i32()) for x in values(word)] for word in ropes[row]]
        scaled_rope.append([arith.ori(arith.shrui(lo, _i32(16)), arith.andi(hi, _i32(-65536))) for lo, hi in bits])
    utils.warpgroup_barrier()
    operands = [scaled[i % 2][2 * j + i // 2] for j in range(8) for i in range(4)] + [scaled_rope[i % 2][i // 2] for i in range(4)]
    return _strided(operands, True), _array([_vector([x]) for x in inverse], BY_ROW, (ROWS,))


def share_queries(_, fragments, inverse, operands, of_rows):
    """To shared memory, where both warpgroups read the queries of both."""
    thread = arith.remui(utils.thread_idx(), _i32(128))
    _, g, _ = _thread()
    fragments = _pointer(utils.memref_ptr(fragments), _mul(thread, 16))
    operands = _scalars(operands)
    for j in range(FRAGMENTS):
        _store(fragments, 2048 * j, operands[4 * j : 4 * j + 4])
    _store_rows(_pointer(utils.memref_ptr(inverse), _mul(g, 4)), 0, _scalars(of_rows))


def _store_rows(pointer, offset, values):
    for k, x in enumerate(values):  # all warps and lanes of a row have the same
        _store(pointer, offset + 32 * k, [x])


def clear(_, page, used):
    """Zeroes the rows of a page from `used` on."""
    first = _mul(used.registers.item(), FP8_BYTES // 16)
    thread = arith.remui(utils.thread_idx(), _i32(128))
    base = _pointer(utils.memref_ptr(page), _mul(thread, 16))
    chunks = PAGE_SIZE * FP8_BYTES // 16
    for i in range(0, chunks, 128):
        chunk = _add(thread, i)
        inside = arith.cmpi(arith.CmpIPredicate.uge, chunk, first)
        if i + 128 > chunks:
            inside = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.ult, chunk, _i32(chunks)))
        with utils.when(inside):
            _store(base, 16 * i, [_i32(0)] * 4)
    utils.warpgroup_barrier()
    utils.commit_shared()


def _tile_scales(page, warp, t, tokens):
    """Of tokens 8 i + 2 t and 8 i + 2 t + 1."""
    scales = _pointer(page, SCALES, _mul(warp, 4), _mul(t, 2 * FP8_BYTES))
    return [[_load(scales, (8 * i + j) * FP8_BYTES, 1, _f32())[0] for j in range(2)] for i in range(tokens // 8)]


def scores(_, page, first, exchange, q, *, rows, tokens):
    """q K' of the tokens from `first` on. Every warp multiplies its columns and adds up what the four have."""
    warp, g, t = _thread()
    page = _pointer(utils.memref_ptr(page), _mul(first.registers.item(), FP8_BYTES))
    row = _pointer(page, _mul(g, FP8_BYTES))
    codes = _pointer(row, _mul(warp, TILE), _mul(t, 32))
    rope = _pointer(row, ROPES, _mul(warp, 32), _mul(t, 8))
    lane = _add(_mul(g, 4), t)
    halves, blocks = range(rows // ROWS), range(tokens // 8)
    if rows == ROWS:
        operands = _scalars(q)
        fragments = [[operands[4 * j : 4 * j + 4] for j in range(FRAGMENTS)]]
    else:  # too many for registers: read when needed
        q = _pointer(utils.memref_ptr(q), _mul(warp, 512), _mul(lane, 16))
        fragments = [_Fragments(q, half) for half in halves]
    scales = _tile_scales(page, warp, t, tokens)
    sums = [[[_f32(0)] * 4 for _ in blocks] for _ in halves]
    at_once = 8 if rows == ROWS else 2  # words of codes in a row; fragments of q wait for them in registers
    for start in range(0, 8, at_once):
        a = [[fragments[half][j] for j in range(start, start + at_once)] for half in halves]
        for i in blocks:
            loads = range(start, start + at_once, min(at_once, 4))
            loaded = [x for k in loads for x in _load(codes, 8 * i * FP8_BYTES + 4 * k, min(at_once, 4))]
            for j, word in enumerate(loaded):
                b = _halves(word)
                for half in halves:
                    sums[half][i] = _mma("f16", sums[half][i], a[half][j], b)
    a = [fragments[half][FRAGMENTS - 1] for half in halves]
    for i in blocks:
        b = _load(rope, 8 * i * FP8_BYTES, 2)
        for half in halves:
            sums[half][i] = _mma("bf16", [_times(x, scales[i][j % 2]) for j, x in enumerate(sums[half][i])], a[half], b)
    exchange = utils.memref_ptr(exchange)
    size = 512 * len(halves) * len(blocks)
    mine = _pointer(exchange, _mul(warp, size), _mul(lane, 16))
    theirs = [_pointer(exchange, _mul(arith.xori(warp, _i32(i)), size), _mul(lane, 16)) for i in (1, 2, 3)]
    flat = [x for half in sums for x in half]
    utils.warpgroup_barrier()  # nobody reads the exchange any more
    for i, x in enumerate(flat):
        _store(mine, 512 * i, x)
    utils.warpgroup_barrier()
    for i, x in enumerate(flat):
        # In an order that gives all warps the same bits: each of them writes the log-sum-exp.
        others = [_load(pointer, 512 * i, 4, _f32()) for pointer in theirs]
        flat[i] = [arith.addf(arith.addf(a, b), arith.addf(c, d)) for a, b, c, d in zip(x, *others)]
    n = len(blocks)
    registers = [_vector(flat[half * n + i][2 * eight : 2 * eight + 2]) for half in halves for eight in range(2) for i in blocks]
    return _array(registers, SCORES, (rows, tokens))


class _Fragments:
    """Operands of 16 rows of q, in shared memory."""

    def __init__(self, pointer, half):
        self.pointer, self.offset = pointer, half * FRAGMENTS * 2048

    def __getitem__(self, j):
        return _load(self.pointer, self.offset + 2048 * j, 4)


def _unpack(o):
    """Registers of SUMS -> accumulators [16 rows][block][4]: of block i element j is column 32 t + i (+ 16, j odd), row g (+ 8, j > 1)."""
    flat = [_element(x, i) for x in o.registers.flat for i in range(4)]
    return [[[flat[64 * half + 32 * (j // 2) + 16 * (j % 2) + i] for j in range(4)] for i in range(16)] for half in range(len(flat) // 64)]


def _pack_sums(acc):
    flat = [half[i][2 * eight + j] for half in acc for eight in range(2) for j in range(2) for i in range(16)]
    return _array([_vector(flat[4 * k : 4 * k + 4]) for k in range(len(flat) // 4)], SUMS, (ROWS * len(acc), LATENT))


def add_values(_, page, first, p, o, alpha, reference, zero):
    """o alpha + P V. `o` is in units of `reference` / HEADROOM, the largest scale of its tile so far, so that P times scales fits float16.

    The last result is 0, known only when everything that was loaded has arrived in registers: loads are not ordered against an arrival at a
    barrier, after which TMA may overwrite what they read.
    """
    warp, g, t = _thread()
    page = _pointer(utils.memref_ptr(page), _mul(first.registers.item(), FP8_BYTES))
    tokens = p.shape[1]
    scales = _tile_scales(page, warp, t, tokens)
    [before] = _scalars(reference)
    top = functools.reduce(_max, (x for pair in scales for x in pair))
    for distance in (1, 2):
        top = _max(top, utils.shfl_bfly(top, distance))
    after = _max(before, top)
    unit = _asm("rcp.approx.ftz.f32 $0, $1;", "f", after)
    scales = [[_times(x, _times(unit, _f32(HEADROOM))) for x in pair] for pair in scales]
    alpha = [_times(x, _times(before, unit)) for x in _scalars(alpha)]
    weights = [[_element(x, j) for j in range(2)] for x in p.registers.flat]  # [8 rows, 8 tokens][2 of them]
    acc = [
        [[_times(x, alpha[2 * half + j // 2]) for j, x in enumerate(block)] for block in blocks] for half, blocks in enumerate(_unpack(o))
    ]
    codes = _pointer(page, _mul(t, 2 * FP8_BYTES), _mul(warp, TILE), _mul(g, 16))
    for step in range(tokens // 16):
        rows = [_load(codes, (16 * step + i) * FP8_BYTES, 4) for i in (0, 1, 8, 9)]
        a = [[] for _ in acc]
        for half, operand in enumerate(a):
            for i in (2 * step, 2 * step + 1):
                for eight in (2 * half, 2 * half + 1):
                    operand.append(_pack(*map(_times, weights[eight * (tokens // 8) + i], scales[i])))
        for word in range(4):
            r = [row[word] for row in rows]
            for pair, selector in enumerate(("0x5140", "0x7362")):
                low, high = (_halves(_prmt(r[2 * k], r[2 * k + 1], selector)) for k in range(2))
                for i in range(2):
                    block = 4 * word + 2 * pair + i
                    for blocks, operand in zip(acc, a):
                        blocks[block] = _mma("f16", blocks[block], operand, (low[i], high[i]))
    last = functools.reduce(arith.addf, (acc[0][4 * word][0] for word in range(4)))
    arrived = arith.andi(utils.bitcast(last, _i32()), zero.registers.item())
    return _pack_sums(acc), _strided([after]), FragmentedArray.splat(arrived, (), is_signed=True)


def to_units(_, o, reference):
    [reference] = _scalars(reference)
    factor = _times(reference, _f32(1 / HEADROOM))
    return _pack_sums([[[_times(x, factor) for x in block] for block in blocks] for blocks in _unpack(o)])


def _halves_of(worker, *arrays):
    """For each of them, the registers of the half of the rows that `worker` has in the end."""
    upper = arith.cmpi(arith.CmpIPredicate.eq, worker, _i32(1))
    split = [(x[: len(x) // 2], x[len(x) // 2 :]) for x in arrays]
    return [[arith.select(upper, b, a) for a, b in zip(*halves)] for halves in split]


def give(_, sums, rows, o, m, total, worker):
    """To the other warpgroup, the half of the rows that it finishes: 1 - worker."""
    _, g, _ = _thread()
    sums = _pointer(utils.memref_ptr(sums), _mul(arith.remui(utils.thread_idx(), _i32(128)), 16))
    rows = _pointer(utils.memref_ptr(rows), _mul(g, 4))
    other = arith.subi(_i32(1), worker.registers.item())
    registers, m, total = _halves_of(other, list(o.registers.flat), _scalars(m), _scalars(total))
    utils.warpgroup_barrier()  # nobody reads the exchange any more
    for k, register in enumerate(registers):
        llvm.store(register, _shift(sums, 2048 * k), alignment=16)
    _store_rows(rows, 0, m + total)


def take(_, sums, rows, o, m, total, worker):
    """What the other has of this half of the rows, joined with what this one has, and its log-sum-exp to base 2."""
    _, g, _ = _thread()
    sums = _pointer(utils.memref_ptr(sums), _mul(arith.remui(utils.thread_idx(), _i32(128)), 16))
    rows = _pointer(utils.memref_ptr(rows), _mul(g, 4))
    registers, m, total = _halves_of(worker.registers.item(), list(o.registers.flat), _scalars(m), _scalars(total))
    eights = len(m)
    factors, log_sums = [], []
    for k in range(eights):
        other_m, other_total = (_load(rows, 32 * i, 1, _f32())[0] for i in (k, eights + k))
        new_m = _max(m[k], other_m)
        mine, other = (_asm("ex2.approx.ftz.f32 $0, $1;", "f", arith.subf(x, new_m)) for x in (m[k], other_m))
        both = arith.addf(_times(total[k], mine), _times(other_total, other))
        some = arith.cmpf(arith.CmpFPredicate.OGT, both, _f32(0))
        inverse = arith.select(some, arith.divf(_f32(1), both), _f32(0))
        factors.append([_times(mine, inverse), _times(other, inverse)])
        log_sums.append(_vector([arith.addf(new_m, _asm("lg2.approx.ftz.f32 $0, $1;", "f", both))]))  # of 0: -inf
    out = []
    for k, register in enumerate(registers):
        theirs = _load(sums, 2048 * k, 4, _f32())
        mine, other = factors[k // 8]
        out.append(_vector([arith.addf(_times(_element(register, i), mine), _times(x, other)) for i, x in enumerate(theirs)]))
    return _array(out, SUMS, (8 * eights, LATENT)), _array(log_sums, BY_ROW, (8 * eights,))


# ---- the same for the interpreter ----


def interpreted_operations(rows, tokens):
    half = rows // 2

    def bytes_of(page):
        return lax.bitcast_convert_type(page[...], jnp.uint8).reshape(PAGE_SIZE, FP8_BYTES)

    def keys(page, first):
        return decode(lax.dynamic_slice_in_dim(bytes_of(page), first, tokens))

    def half_of(x, worker):
        return lax.dynamic_slice_in_dim(x, worker * half, half)

    def share_queries(fragments, inverse, operands, of_rows):
        fragments[...] = lax.bitcast_convert_type(operands.reshape(*fragments.shape, 2), jnp.int32)
        inverse[...] = of_rows

    def clear(page, used):
        cleared = jnp.where(jnp.arange(PAGE_SIZE)[:, None] < used, bytes_of(page), 0).astype(jnp.uint8)
        page[...] = lax.bitcast_convert_type(cleared.reshape(LINES, WORDS, 4), jnp.int32)

    def scores(page, first, _, q):
        if rows > ROWS:
            q = lax.bitcast_convert_type(q[...], jnp.bfloat16).reshape(rows, LATENT + ROPE)
        return q.astype(jnp.float32) @ keys(page, first).T

    def add_values(page, first, p, o, alpha, reference, _):
        return o * alpha[:, None] + p @ keys(page, first)[:, :LATENT], reference, 0

    def give(sums, of_rows, o, m, total, worker):
        sums[...] = half_of(o, 1 - worker).reshape(-1)
        of_rows[...] = jnp.pad(jnp.concatenate([half_of(x, 1 - worker) for x in (m, total)]), (0, of_rows.shape[0] - rows))

    def take(sums, of_rows, o, m, total, worker):
        o, m, total = (half_of(x, worker) for x in (o, m, total))
        other, others = sums[...].reshape(o.shape), of_rows[...]
        new_m = jnp.maximum(m, others[:half])
        mine, theirs = jnp.exp2(m - new_m), jnp.exp2(others[:half] - new_m)
        total = total * mine + others[half:rows] * theirs
        o = o * mine[:, None] + other * theirs[:, None]
        return o * jnp.where(total > 0, 1 / total, 0)[:, None], new_m + jnp.log2(total)

    return types.SimpleNamespace(
        load_queries=lambda q, _: (q[...], jnp.ones(ROWS)),
        share_queries=share_queries,
        clear=clear,
        scores=scores,
        add_values=add_values,
        to_units=lambda o, _: o,
        give=give,
        take=take,
    )
