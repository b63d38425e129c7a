"""The quantise ops on Hopper in one pass over memory: a CTA takes 64 rows of a few blocks of 128 columns.

Several CTAs share an SM, and their loads hide each other's latency, so there is no pipeline. `quantize_blocks` runs as XLA compiles its
reference, which reads the weights twice: once for the scales, once for the codes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import ROWS, swizzled
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.divide import exact_divide_on
from pallas_kernels.quantize.reference import tile_scales
from pallas_kernels.quantize.transposed import transpose_quantize
from pallas_kernels.quantized import BLOCK, E4M3, Quantized, num_blocks, pad_to

TILE_ROWS = 64
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of a tile


def quantize_tiles(x, *, pow2=False, interpret=None):
    return _over_leading_axes(x, functools.partial(_quantize, lambda t: t, (0,), pow2, interpret))


def swiglu_quantize(gate_up, *, pow2=False, interpret=None):
    half = gate_up.shape[-1] // 2
    if half % BLOCK:  # the halves would not begin at whole blocks
        gate, up = (pad_to(part, (*part.shape[:-1], num_blocks(half) * BLOCK)) for part in jnp.split(gate_up, 2, axis=-1))
        gate_up = jnp.concatenate([gate, up], axis=-1)

    def swiglu(gate, up):
        return gate * jax.nn.sigmoid(gate) * up

    q = _over_leading_axes(gate_up, functools.partial(_quantize, swiglu, (0, num_blocks(half)), pow2, interpret))
    return Quantized(q.values[..., :half], q.stored_scales, q.kind)


def rmsnorm_quantize(x, weight, *, eps=1e-6, pow2=False, interpret=None):
    """The row norms are a reduction of their own, before: a row does not fit into an SM beside its neighbours."""
    norm = lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1) + eps)

    def run(x, norm):
        return _quantize(lambda t, norm, weight: t * norm * weight, (0,), pow2, interpret, x, norm, weight.astype(jnp.float32))

    for _ in range(x.ndim - 2):
        run = jax.vmap(run)
    return run(x, norm)


def requantize_transposed(q, group_sizes=None, *, pow2=False, interpret=None):
    return transpose_quantize(q.values, q.stored_scales, group_sizes, pow2=pow2, interpret=interpret)


def quantize_both(x, group_sizes=None, *, pow2=False, interpret=None):
    """Two kernels, each of which reads x; what is not of 16 bits is transposed by XLA."""
    rows = quantize_tiles(x, pow2=pow2, interpret=interpret)
    if x.dtype.itemsize != 2:
        return rows, reference.quantize_both(x, group_sizes, pow2=pow2)[1]
    return rows, transpose_quantize(x, None, group_sizes, pow2=pow2, interpret=interpret)


def _over_leading_axes(x, function):
    """`function` on [M, K], for x [..., M, K]."""
    for _ in range(x.ndim - 2):
        function = jax.vmap(function)
    return function(x)


def _quantize(combine, first_blocks, pow2, interpret, x, by_row=None, by_column=None):
    """Tiles of combine(x from its block first_blocks[0] on, ..., by_row, by_column); x [M, K], by_row [M], by_column [K]."""
    rows, k = x.shape
    x = pad_to(x, (rows if rows <= ROWS else -(-rows // ROWS) * ROWS, num_blocks(k) * BLOCK))
    padded_rows, blocks = x.shape[0], x.shape[1] // BLOCK // len(first_blocks)
    per_cta = math.gcd(blocks, 4 if len(first_blocks) == 1 and by_row is None else 2)  # a copy has at most 256 columns
    parts = [(i, first) for i in range(per_cta) for first in first_blocks]
    scaled = by_row is not None
    factors = [pad_to(by_row, (-(-rows // 4) * 4,)), pad_to(by_column, x.shape[1:])] if scaled else []

    def body(x, *refs):
        factors, (values, scales, smem) = refs[: 2 * scaled], refs[2 * scaled :]
        row, block = lax.axis_index("row") * TILE_ROWS, lax.axis_index("block") * per_cta
        for slot, (i, first) in enumerate(parts):
            columns = pl.ds((first + block + i) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(row, TILE_ROWS), columns], smem["x"].at[slot], smem["loaded"].at[slot])
        extra = []
        if scaled:
            plgpu.copy_gmem_to_smem(factors[0].at[pl.ds(row, TILE_ROWS)], smem["by_row"], smem["loaded"].at[len(parts)])
            plgpu.copy_gmem_to_smem(
                factors[1].at[pl.ds(block * BLOCK, per_cta * BLOCK)], smem["by_column"], smem["loaded"].at[len(parts) + 1]
            )
            plgpu.barrier_wait(smem["loaded"].at[len(parts)])
            plgpu.barrier_wait(smem["loaded"].at[len(parts) + 1])
            extra = [lax.broadcast_in_dim(plgpu.load(smem["by_row"], layout=ROW), (TILE_ROWS, BLOCK), [0])]
        for i in range(per_cta):
            tiles = []
            for slot in range(i * len(first_blocks), (i + 1) * len(first_blocks)):
                plgpu.barrier_wait(smem["loaded"].at[slot])
                tiles.append(plgpu.load(smem["x"].at[slot], layout=plgpu.Layout.WGMMA).astype(jnp.float32))
            if scaled:
                column = plgpu.load(smem["by_column"].at[pl.ds(i * BLOCK, BLOCK)], layout=plgpu.Layout.WGMMA.reduce(0))
                tiles += [*extra, lax.broadcast_in_dim(column, (TILE_ROWS, BLOCK), [1])]
            tile = combine(*tiles)
            scale = tile_scales(jnp.max(jnp.abs(tile), axis=1), pow2=pow2, divide=exact_divide_on(ROW, interpret))
            spread = lax.broadcast_in_dim(scale, tile.shape, [0])
            smem["values"][i] = exact_divide_on(plgpu.Layout.WGMMA, interpret)(tile, spread).astype(E4M3)
            smem["scales"][i] = scale
            plgpu.commit_smem()
            columns = pl.ds((block + i) * BLOCK, BLOCK)
            plgpu.copy_smem_to_gmem(smem["values"].at[i], values.at[pl.ds(row, TILE_ROWS), columns])
            plgpu.copy_smem_to_gmem(smem["scales"].at[i], scales.at[block + i, pl.ds(row, TILE_ROWS)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = {
        "x": plgpu.SMEM((len(parts), TILE_ROWS, BLOCK), x.dtype, transforms=swizzled(BLOCK, x.dtype)),
        "values": plgpu.SMEM((per_cta, TILE_ROWS, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
        "scales": plgpu.SMEM((per_cta, TILE_ROWS), jnp.float32),
        "loaded": plgpu.Barrier(num_barriers=len(parts) + 2 * scaled),
    }
    if scaled:
        scratch |= {"by_row": plgpu.SMEM((TILE_ROWS,), jnp.float32), "by_column": plgpu.SMEM((per_cta * BLOCK,), jnp.float32)}
    values, scales = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((padded_rows, blocks * BLOCK), E4M3),
            jax.ShapeDtypeStruct((blocks, -(-padded_rows // 4) * 4), jnp.float32),
        ),
        scratch_types=[scratch],
        grid=(-(-rows // TILE_ROWS), blocks // per_cta),
        grid_names=("row", "block"),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
    )(x, *factors)
    return Quantized(values[:rows, : k // len(first_blocks)], scales[:, :rows], "tiles")
