"""The quantise ops on Hopper. Here those by rows, in one pass over memory: a CTA takes 64 rows of a block of 128 columns.

Several CTAs share an SM, and their loads hide each other's latency, so there is no pipeline.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import ROWS, swizzled
from pallas_kernels.quantize import rmsnorm
from pallas_kernels.quantize.reference import AMAX_FLOOR
from pallas_kernels.quantize.registers import quantize_registers, rows_layout
from pallas_kernels.quantize.swiglu import swiglu_backward  # noqa: F401
from pallas_kernels.quantize.transposed import quantize_by_tokens
from pallas_kernels.quantized import BLOCK, E4M3, Quantized, num_blocks, pad_to

TILE_ROWS = 64


def quantize_tiles(x, *, pow2=False, floor=AMAX_FLOOR, interpret=None):
    run = functools.partial(_quantize, lambda t: [[t]], 1, pow2=pow2, floor=floor, interpret=interpret)
    return _over_leading_axes(x, run)[0]


def swiglu_quantize(gate_up, *, pow2=False, interpret=None):
    return _swiglu(lambda gate, up: [[gate * jax.nn.sigmoid(gate) * up]], gate_up, pow2, interpret)[0]


def swiglu_quantize_both(gate_up, *, pow2=False, interpret=None):
    if gate_up.shape[-1] // 2 % BLOCK:  # a tile of gate_up lies in gate and in up
        return swiglu_quantize(gate_up, pow2=pow2, interpret=interpret), quantize_tiles(gate_up, interpret=interpret)
    return _swiglu(lambda gate, up: [[gate * jax.nn.sigmoid(gate) * up], [gate, up]], gate_up, pow2, interpret)


def _swiglu(combine, gate_up, pow2, interpret):
    half = gate_up.shape[-1] // 2
    if half % BLOCK:  # the halves would not begin at whole blocks
        gate, up = (pad_to(part, (*part.shape[:-1], num_blocks(half) * BLOCK)) for part in jnp.split(gate_up, 2, axis=-1))
        gate_up = jnp.concatenate([gate, up], axis=-1)
    run = functools.partial(_quantize, combine, 2, pow2=pow2, floor=AMAX_FLOOR, interpret=interpret)
    hidden, *kept = _over_leading_axes(gate_up, run)
    return Quantized(hidden.values[..., :half], hidden.stored_scales, hidden.kind), *kept


def rmsnorm_quantize(x, weight, *, eps=1e-6, pow2=False, interpret=None):
    if not rmsnorm.fits(x):  # 14,000 float32 columns and more: the normed rows make a way through memory
        x = x.astype(jnp.float32)
        norm = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
        return quantize_tiles(x * norm * weight.astype(jnp.float32), pow2=pow2, interpret=interpret)
    run = functools.partial(rmsnorm.rmsnorm_quantize_rows, eps=eps, pow2=pow2, interpret=interpret)
    for _ in range(x.ndim - 2):
        run = jax.vmap(run, in_axes=(0, None))
    return run(x, weight)


def requantize_transposed(q, group_sizes=None, *, pow2=False, interpret=None):
    return quantize_by_tokens(q.values, q.stored_scales, group_sizes, pow2=pow2, floor=AMAX_FLOOR, interpret=interpret)[1]


def quantize_both(x, group_sizes=None, *, pow2=False, floor=AMAX_FLOOR, interpret=None):
    return quantize_by_tokens(x, None, group_sizes, pow2=pow2, floor=floor, interpret=interpret)


def _over_leading_axes(x, function):
    """`function` on [M, K], for x [..., M, K]."""
    for _ in range(x.ndim - 2):
        function = jax.vmap(function)
    return function(x)


def _quantize(combine, parts, x, *, pow2, floor, interpret):
    """Tiles of one or two arrays made from x [M, K], which has `parts` side by side; only the first result has scales by `pow2`.

    combine: from a float32 tile of each part to the tiles of each array: as many as it has parts of that width.
    """
    rows, k = x.shape
    x = pad_to(x, (rows if rows <= ROWS else -(-rows // ROWS) * ROWS, num_blocks(k) * BLOCK))
    padded_rows, blocks, layout = x.shape[0], x.shape[1] // BLOCK // parts, rows_layout(x.dtype)
    tile_rows = min(TILE_ROWS, -(-rows // 16) * 16)
    tile = jax.ShapeDtypeStruct((tile_rows, BLOCK), jnp.float32)
    widths = [len(tiles) for tiles in jax.eval_shape(combine, *[tile] * parts)]

    def body(x, *refs):
        *results, smem = refs
        row, block = pl.ds(lax.axis_index("row") * tile_rows, tile_rows), lax.axis_index("block")
        for part in range(parts):
            columns = pl.ds((part * blocks + block) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(x.at[row, columns], smem["x"].at[part], smem["loaded"])
        plgpu.barrier_wait(smem["loaded"])
        tiles = [plgpu.load(smem["x"].at[part], layout=layout).astype(jnp.float32) for part in range(parts)]
        slot = 0
        for index, made in enumerate(combine(*tiles)):
            values, scales = results[2 * index : 2 * index + 2]
            for part, one in enumerate(made):
                options = {"pow2": pow2 and index == 0, "floor": floor, "interpret": interpret}
                (codes,), smem["scales"][slot] = quantize_registers([one], layout, **options)
                smem["values"][slot] = codes.astype(E4M3)
                plgpu.commit_smem()
                where = part * blocks + block
                plgpu.copy_smem_to_gmem(smem["values"].at[slot], values.at[row, pl.ds(where * BLOCK, BLOCK)])
                plgpu.copy_smem_to_gmem(smem["scales"].at[slot], scales.at[where, row])
                slot += 1
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = {
        "x": plgpu.SMEM((parts, tile_rows, BLOCK), x.dtype, transforms=swizzled(BLOCK, x.dtype)),
        "values": plgpu.SMEM((sum(widths), tile_rows, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
        "scales": plgpu.SMEM((sum(widths), tile_rows), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=parts),
    }
    out_type = []
    for width in widths:
        out_type.append(jax.ShapeDtypeStruct((padded_rows, width * blocks * BLOCK), E4M3))
        # Whole tiles of scales: a copy of one line is not cut off at its end.
        out_type.append(jax.ShapeDtypeStruct((width * blocks, -(-rows // tile_rows) * tile_rows), jnp.float32))
    results = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=[scratch],
        grid=(-(-rows // tile_rows), blocks),
        grid_names=("row", "block"),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=parts > 1),  # SwiGLU's exponential and division
    )(x)
    columns = [width * (k // parts) for width in widths]
    return [Quantized(v[:rows, :c], s[:, :rows], "tiles") for v, s, c in zip(results[::2], results[1::2], columns)]
