"""The backward pass of SwiGLU on Hopper, in one pass over memory: from its input kept in e4m3 to the gradient of that and to its output,
tiled along the tokens for Wgrad.

A CTA takes 128 tokens of 64 columns of gate, up and d_hidden. Groups of tokens: as in `transposed.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import swizzled
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import AMAX_FLOOR, swiglu_gradients
from pallas_kernels.quantize.registers import COLUMNS, load_transposed, quantize_registers, rows_layout
from pallas_kernels.quantize.transposed import HALF, HALVES, any_row, clear_rows, load_rows, rows_touched, token_tiles
from pallas_kernels.quantized import BLOCK, E4M3, Quantized, pad_to
from pallas_kernels.store import store


def swiglu_backward(gate_up, d_hidden, row_weights=None, group_sizes=None, *, interpret=None):
    tokens, width = d_hidden.shape
    if width % BLOCK or d_hidden.dtype.itemsize != 2:  # the halves would not begin at whole blocks
        return reference.swiglu_backward(gate_up, d_hidden, row_weights, group_sizes)
    table, room, columns_of_up = token_tiles(tokens, group_sizes), rows_touched(tokens, group_sizes), width // HALF
    weighted, tiles = row_weights is not None, table.shape[0]
    operands = [table, gate_up.values, pad_to(gate_up.stored_scales, (2 * width // BLOCK, room)), d_hidden]
    operands += [pad_to(row_weights.astype(jnp.float32), (room,))] if weighted else []
    layout = rows_layout(d_hidden.dtype)

    def body(*refs):
        table, codes, code_scales, d_hidden, *row_weights = refs[: len(operands)]
        d_gate_up, values, scales, *d_weights, smem = refs[len(operands) :]
        tile, column = lax.axis_index("tokens"), lax.axis_index("columns")
        first, count = table[tile, 0], table[tile, 1]
        rows = pl.ds(first, BLOCK)
        both = [(i, pl.ds((column + i * columns_of_up) * HALF, HALF)) for i in range(2)]  # gate and up
        for i, columns in both:
            plgpu.copy_gmem_to_smem(codes.at[rows, columns], smem["codes"].at[i], smem["loaded"])
        plgpu.copy_gmem_to_smem(d_hidden.at[rows, both[0][1]], smem["d_up"], smem["loaded"])
        factors = [code_scales.at[(column + i * columns_of_up) // 2] for i in range(2)] + row_weights
        factors = [[load_rows(ref, first + start, layout) for ref in factors] for start in (0, HALF)]
        plgpu.barrier_wait(smem["loaded"])

        for half, start, by_row in zip(HALVES, (0, HALF), factors):
            by_row = [plgpu.layout_cast(lax.broadcast_in_dim(factor, (HALF, HALF), [0]), layout) for factor in by_row]
            refs = [smem["codes"].at[0, half], smem["codes"].at[1, half], smem["d_up"].at[half]]
            gate, up, d = (plgpu.load(ref, layout=layout).astype(jnp.float32) for ref in refs)
            hidden, d_gate, d_up, d_weight = swiglu_gradients(gate * by_row[0], up * by_row[1], d, *by_row[2:])
            for name, value in (("hidden", hidden), ("d_gate", d_gate), ("d_up", d_up)):
                smem[name].at[half][...] = value.astype(smem[name].dtype)
            for ref in d_weights:
                store(ref.at[column, pl.ds(first + start, HALF)], jnp.sum(d_weight, axis=1))
        plgpu.commit_smem()
        for name, (_, columns) in zip(("d_gate", "d_up"), both):
            plgpu.copy_smem_to_gmem(smem[name], d_gate_up.at[rows, columns])

        pl.when(count < BLOCK)(lambda: clear_rows(smem["hidden"], count, layout))
        part = load_transposed(smem["hidden"], interpret).astype(jnp.float32)
        (part,), scale = quantize_registers([part], COLUMNS, pow2=False, floor=AMAX_FLOOR, interpret=interpret)
        smem["values"][...] = part.astype(E4M3)
        smem["scales"][...] = scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["values"], values.at[both[0][1], pl.ds(tile * BLOCK, BLOCK)])
        plgpu.copy_smem_to_gmem(smem["scales"], scales.at[tile, both[0][1]])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def square(dtype):
        return plgpu.SMEM((BLOCK, HALF), dtype, transforms=any_row(dtype))

    out_type = [
        jax.ShapeDtypeStruct((tokens, 2 * width), d_hidden.dtype),
        jax.ShapeDtypeStruct((width, tiles * BLOCK), E4M3),
        jax.ShapeDtypeStruct((tiles, width), jnp.float32),
    ]
    scratch = {
        "codes": plgpu.SMEM((2, BLOCK, HALF), E4M3, transforms=any_row(E4M3)),
        "hidden": square(d_hidden.dtype),
        "d_gate": square(d_hidden.dtype),
        "d_up": square(d_hidden.dtype),  # at first d_hidden
        "values": plgpu.SMEM((HALF, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
        "scales": plgpu.SMEM((HALF,), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=3),
    }
    if weighted:
        out_type.append(jax.ShapeDtypeStruct((width // HALF, room), jnp.float32))
    d_gate_up, values, scales, *d_weights = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=[scratch],
        grid=(tiles, width // HALF),
        grid_names=("tokens", "columns"),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    hidden = Quantized(values, scales, "tiles")
    return d_gate_up, hidden, jnp.sum(d_weights[0], axis=0)[:tokens] if weighted else None
