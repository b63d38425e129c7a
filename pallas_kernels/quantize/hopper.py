"""`quantize_tiles` and `swiglu_quantize` on Hopper in one pass over memory: a CTA takes 64 rows of a few blocks of 128 columns.

Several CTAs share an SM, and their loads hide each other's latency, so there is no pipeline. The other quantise ops run as XLA compiles
their references, which read their input twice: once for the scales, once for the codes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.gemm import ROWS, swizzled
from pallas_kernels.quantize.reference import exact_divide, tile_scales
from pallas_kernels.quantized import BLOCK, E4M3, Quantized, num_blocks, pad_to

TILE_ROWS = 64
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of a tile


def quantize_tiles(x, *, pow2=False, interpret=None):
    return _over_leading_axes(x, functools.partial(_quantize, (0,), lambda t: t, pow2, interpret))


def swiglu_quantize(gate_up, *, pow2=False, interpret=None):
    half = gate_up.shape[-1] // 2
    if half % BLOCK:  # the halves would not begin at whole blocks
        gate, up = (pad_to(part, (*part.shape[:-1], num_blocks(half) * BLOCK)) for part in jnp.split(gate_up, 2, axis=-1))
        gate_up = jnp.concatenate([gate, up], axis=-1)
    blocks = num_blocks(half)
    q = _over_leading_axes(gate_up, functools.partial(_quantize, (0, blocks), lambda g, u: g * jax.nn.sigmoid(g) * u, pow2, interpret))
    return Quantized(q.values[..., :half], q.stored_scales, q.kind)


def _over_leading_axes(x, function):
    """`function` on [M, K], for x [..., M, K]."""
    for _ in range(x.ndim - 2):
        function = jax.vmap(function)
    return function(x)


def _quantize(first_blocks, combine, pow2, interpret, x):
    """Tiles of combine(x from its block first_blocks[0] on, x from its block first_blocks[1] on, ...); x [M, K]."""
    rows, k = x.shape
    x = pad_to(x, (rows if rows <= ROWS else -(-rows // ROWS) * ROWS, num_blocks(k) * BLOCK))
    padded_rows, blocks = x.shape[0], x.shape[1] // BLOCK // len(first_blocks)
    per_cta = math.gcd(blocks, 4 // len(first_blocks))
    parts = [(i, first) for i in range(per_cta) for first in first_blocks]

    def body(x, values, scales, x_smem, values_smem, scales_smem, loaded):
        row, block = lax.axis_index("row") * TILE_ROWS, lax.axis_index("block") * per_cta
        for slot, (i, first) in enumerate(parts):
            columns = pl.ds((first + block + i) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(row, TILE_ROWS), columns], x_smem.at[slot], loaded.at[slot])
        for i in range(per_cta):
            tiles = []
            for slot in range(i * len(first_blocks), (i + 1) * len(first_blocks)):
                plgpu.barrier_wait(loaded.at[slot])
                tiles.append(plgpu.load(x_smem.at[slot], layout=plgpu.Layout.WGMMA).astype(jnp.float32))
            tile = combine(*tiles)
            scale = tile_scales(jnp.max(jnp.abs(tile), axis=1), pow2=pow2, divide=_divide(ROW, interpret))
            spread = lax.broadcast_in_dim(scale, tile.shape, [0])
            values_smem[i] = _divide(plgpu.Layout.WGMMA, interpret)(tile, spread).astype(E4M3)
            scales_smem[i] = scale
            plgpu.commit_smem()
            columns = pl.ds((block + i) * BLOCK, BLOCK)
            plgpu.copy_smem_to_gmem(values_smem.at[i], values.at[pl.ds(row, TILE_ROWS), columns])
            plgpu.copy_smem_to_gmem(scales_smem.at[i], scales.at[block + i, pl.ds(row, TILE_ROWS)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = (
        jax.ShapeDtypeStruct((padded_rows, blocks * BLOCK), E4M3),
        jax.ShapeDtypeStruct((blocks, -(-padded_rows // 4) * 4), jnp.float32),
    )
    values, scales = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((len(parts), TILE_ROWS, BLOCK), x.dtype, transforms=swizzled(BLOCK, x.dtype)),
            plgpu.SMEM((per_cta, TILE_ROWS, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
            plgpu.SMEM((per_cta, TILE_ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=len(parts)),
        ],
        grid=(-(-rows // TILE_ROWS), blocks // per_cta),
        grid_names=("row", "block"),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
    )(x)
    return Quantized(values[:rows, : k // len(first_blocks)], scales[:, :rows], "tiles")


def _divide(layout, interpret):
    """Division that rounds once. Mosaic's own is `div.full`, which is up to two units off; the interpreter's is exact."""
    if interpret is not None:
        return exact_divide

    def divide(x, y):
        @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
        def exact(_, x, y):
            return x._pointwise(_divide_registers, y)

        return exact(x, plgpu.layout_cast(y, layout))  # a constant has no layout yet

    return divide


def _divide_registers(x, y):
    if not isinstance(x.type, ir.VectorType):
        return llvm.inline_asm(x.type, [x, y], "div.rn.f32 $0, $1, $2;", "=f,f,f")
    for i in range(ir.VectorType(x.type).shape[0]):
        quotient = _divide_registers(vector.extract(x, [], [i]), vector.extract(y, [], [i]))
        x = vector.insert(quotient, x, [], [i])
    return x
