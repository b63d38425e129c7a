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
    """The row norms are a reduction of their own, before: a row does not fit into an SM beside its neighbours."""
    norm = lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1) + eps)

    def run(x, norm):
        return _quantize(
            lambda t, norm, weight: [[t * norm * weight]], 1, x, norm, weight, pow2=pow2, floor=AMAX_FLOOR, interpret=interpret
        )[0]

    for _ in range(x.ndim - 2):
        run = jax.vmap(run)
    return run(x, norm)


def requantize_transposed(q, group_sizes=None, *, pow2=False, interpret=None):
    return quantize_by_tokens(q.values, q.stored_scales, group_sizes, pow2=pow2, floor=AMAX_FLOOR, interpret=interpret)[1]


def quantize_both(x, group_sizes=None, *, pow2=False, floor=AMAX_FLOOR, interpret=None):
    return quantize_by_tokens(x, None, group_sizes, pow2=pow2, floor=floor, interpret=interpret)


def _over_leading_axes(x, function):
    """`function` on [M, K], for x [..., M, K]."""
    for _ in range(x.ndim - 2):
        function = jax.vmap(function)
    return function(x)


def _quantize(combine, parts, x, by_row=None, by_column=None, *, pow2, floor, interpret):
    """Tiles of one or two arrays made from x [M, K], which has `parts` side by side; only the first result has scales by `pow2`.

    combine: from a float32 tile of each part, and by_row [M] and by_column [K] spread over it if given, to the tiles of each array: as many
    as it has parts of that width.
    """
    rows, k = x.shape
    x = pad_to(x, (rows if rows <= ROWS else -(-rows // ROWS) * ROWS, num_blocks(k) * BLOCK))
    padded_rows, blocks, layout = x.shape[0], x.shape[1] // BLOCK // parts, rows_layout(x.dtype)
    tile_rows = min(TILE_ROWS, -(-rows // 16) * 16)
    tile = jax.ShapeDtypeStruct((tile_rows, BLOCK), jnp.float32)
    scaled = by_row is not None
    widths = [len(tiles) for tiles in jax.eval_shape(combine, *[tile] * (parts + 2 * scaled))]
    factors = [pad_to(by_row, (-(-rows // 4) * 4,)), pad_to(by_column.astype(jnp.float32), x.shape[1:])] if scaled else []

    def body(x, *refs):
        factors, results, smem = refs[: 2 * scaled], refs[2 * scaled : -1], refs[-1]
        row, block = pl.ds(lax.axis_index("row") * tile_rows, tile_rows), lax.axis_index("block")
        for part in range(parts):
            columns = pl.ds((part * blocks + block) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(x.at[row, columns], smem["x"].at[part], smem["loaded"])
        if scaled:
            plgpu.copy_gmem_to_smem(factors[0].at[row], smem["by_row"], smem["loaded"])
            plgpu.copy_gmem_to_smem(factors[1].at[pl.ds(block * BLOCK, BLOCK)], smem["by_column"], smem["loaded"])
        plgpu.barrier_wait(smem["loaded"])
        tiles = [plgpu.load(smem["x"].at[part], layout=layout).astype(jnp.float32) for part in range(parts)]
        for axis, name in enumerate(("by_row", "by_column") if scaled else ()):
            factor = plgpu.load(smem[name], layout=layout.reduce(1 - axis), optimized=False)
            tiles.append(plgpu.layout_cast(lax.broadcast_in_dim(factor, tile.shape, [axis]), layout))
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
        "loaded": plgpu.Barrier(num_arrivals=parts + 2 * scaled),
    }
    if scaled:
        scratch |= {"by_row": plgpu.SMEM((tile_rows,), jnp.float32), "by_column": plgpu.SMEM((BLOCK,), jnp.float32)}
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
    )(x, *factors)
    columns = [width * (k // parts) for width in widths]
    return [Quantized(v[:rows, :c], s[:, :rows], "tiles") for v, s, c in zip(results[::2], results[1::2], columns)]
