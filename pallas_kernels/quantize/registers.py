"""What the quantise kernels do in registers: layouts, scales and codes, and a division that rounds once.

Mosaic's own division becomes `div.full`, which may be two units off, and then a code is wrong. `div.rn` costs a dozen instructions, more
than everything else that is done to an element, so it only makes the reciprocal of each scale; a quotient is a product with two
corrections, whose remainders are exact by fused multiply-adds. If the reciprocal is rounded to nearest, and what the last correction
starts from is one of the two floats around the true quotient, its result is rounded to nearest (P. Markstein, Computation of elementary
functions on the IBM RISC System/6000 processor, 1990, theorem 7.1).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from pallas_kernels.quantize.reference import exact_divide, tile_scales


def rows_layout(dtype):
    """[16 i, 64 j] by rows: a warp takes 4 rows at a time, 8 lanes to a row, 16 bytes to a lane. SMEM gives whole lines, and the maximum of
    128 values needs three exchanges between lanes."""
    vector = min(16 // jnp.dtype(dtype).itemsize, 8)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((16, 8 * vector), (4, 8 * vector), (vector,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )


# [32 i columns, 16 j tokens] of a transposed tile: a warp takes 8 columns, a lane four neighbouring tokens of one, so that codes are
# stored without bank conflicts. The four lie in different rows of SMEM and are loaded one by one.
_LOADED = plgpu.Layout.TILED(plgpu.Tiling(((32, 16), (8, 16), (4,), (1,))), warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1)
COLUMNS = plgpu.Layout.TILED(plgpu.Tiling(((32, 16), (8, 16), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def load_transposed(ref, interpret):
    """The transpose of an SMEM ref [tokens, 64], in `COLUMNS`."""
    ref = ref.transpose((1, 0))
    if interpret is not None:
        return ref[...]
    shape, layout = ref.shape, COLUMNS.to_mgpu()

    @plgpu.inline_mgpu(arg_types=(_LOADED,), return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=COLUMNS))
    def pack(_, x):
        registers = np.empty(layout.registers_shape(shape), object)
        for i in np.ndindex(registers.shape):
            registers[i] = utils.vector_concat([x.registers[*i[:-1], token, 0] for token in range(4)])
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return pack(plgpu.load(ref, layout=_LOADED, optimized=False))


def quantize_registers(parts, layout, *, pow2, floor, interpret):
    """(codes of each part, scales) of float32 parts [rows, columns] in `layout` that share a scale by row: codes still in float32, scales
    [rows] in `layout.reduce(1)`."""
    amax = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(part), axis=1) for part in parts))
    scales = tile_scales(amax, pow2=pow2, floor=floor, divide=divide_on(layout.reduce(1), interpret))
    return [quotients(part, scales, layout, interpret) for part in parts], scales


def quotients(part, scales, layout, interpret):
    """part / scales[:, None], rounded once; scales are at least 1e-30 or so, infinite, or NaN."""
    if interpret is not None:
        return exact_divide(part, lax.broadcast_in_dim(scales, part.shape, [0]))
    # An infinite scale makes zeros of finite values: their remainders must not become 0 * inf.
    reciprocals = divide_on(layout.reduce(1), interpret)(jnp.ones_like(scales), scales)
    operands = jnp.where(scales == jnp.inf, 0.0, scales), reciprocals

    @plgpu.inline_mgpu(arg_types=(layout,) * 3, return_type=plgpu.ShapeDtypeStruct(part.shape, jnp.float32, layout=layout))
    def run(_, x, scale, reciprocal):
        return x._pointwise(_quotient, scale, reciprocal)

    return run(part, *(plgpu.layout_cast(lax.broadcast_in_dim(s, part.shape, [0]), layout) for s in operands))


def _quotient(x, scale, reciprocal):
    """The remainders are negated so that -0 / scale stays -0."""
    minus_x, minus_reciprocal = arith.negf(x), arith.negf(reciprocal)
    quotient = arith.mulf(x, reciprocal)
    for _ in range(2):
        quotient = math.fma(math.fma(quotient, scale, minus_x), minus_reciprocal, quotient)
    return quotient


def divide_on(layout, interpret):
    """A function (x, y) -> x / y for float32 arrays in `layout`, by div.rn."""
    if interpret is not None:
        return exact_divide

    def divide(x, y):
        @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
        def exact(_, x, y):
            return x._pointwise(_divide_registers, y)

        return exact(*(plgpu.layout_cast(operand, layout) for operand in (x, y)))  # a constant has no layout yet

    return divide


def _divide_registers(x, y):
    if not isinstance(x.type, ir.VectorType):
        return llvm.inline_asm(x.type, [x, y], "div.rn.f32 $0, $1, $2;", "=f,f,f")
    for i in range(ir.VectorType(x.type).shape[0]):
        quotient = _divide_registers(vector.extract(x, [], [i]), vector.extract(y, [], [i]))
        x = vector.insert(quotient, x, [], [i])
    return x
