"""A CTA takes 128 rows of 64 columns of gate, up and d_hidden, and writes the gradients where gate and up were. Four CTAs share an SM and
hide each other's latency."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantize.reference import swiglu_gradients
from pallas_kernels.quantize.registers import rows_layout
from pallas_kernels.quantize.transposed import any_row
from pallas_kernels.quantized import num_blocks, pad_to
from pallas_kernels.store import store

ROWS, COLUMNS = 128, 64
IN_REGISTERS = 32  # rows at a time


def supports(gate_up, d_hidden) -> bool:
    """Whether the kernel takes operands of this width and these dtypes."""
    return d_hidden.shape[1] % COLUMNS == 0 and {gate_up.dtype.itemsize, d_hidden.dtype.itemsize} == {2}


def swiglu_gradient(gate_up, d_hidden, row_weights=None, *, interpret=None):
    tokens, width = d_hidden.shape
    tiles, columns_of_up = num_blocks(tokens), width // COLUMNS
    operands = [gate_up, d_hidden]
    operands += [] if row_weights is None else [pad_to(row_weights.astype(jnp.float32), (tiles * ROWS,))]
    layout = rows_layout(gate_up.dtype)

    def body(gate_up, d_hidden, *refs):
        (d_gate_up, *d_weights), (smem, loaded), weights = refs[len(operands) - 2 : -2], refs[-2:], refs[: len(operands) - 2]
        tile, column = lax.axis_index("rows"), lax.axis_index("columns")
        rows = pl.ds(tile * ROWS, ROWS)
        both = [pl.ds((column + i * columns_of_up) * COLUMNS, COLUMNS) for i in range(2)]  # gate and up
        for i, columns in enumerate(both):
            plgpu.copy_gmem_to_smem(gate_up.at[rows, columns], smem.at[i], loaded)
        plgpu.copy_gmem_to_smem(d_hidden.at[rows, both[0]], smem.at[2], loaded)
        plgpu.barrier_wait(loaded)
        for start in range(0, ROWS, IN_REGISTERS):
            part, here = pl.ds(start, IN_REGISTERS), pl.ds(tile * ROWS + start, IN_REGISTERS)
            gate, up, d = (plgpu.load(smem.at[i, part], layout=layout).astype(jnp.float32) for i in range(3))
            by_row = [plgpu.load(ref.at[here], layout=layout.reduce(1), optimized=False) for ref in weights]
            by_row = [plgpu.layout_cast(lax.broadcast_in_dim(factor, gate.shape, [0]), layout) for factor in by_row]
            _, d_gate, d_up, d_weight = swiglu_gradients(gate, up, d, *by_row)
            for i, gradient in enumerate((d_gate, d_up)):
                smem.at[i, part][...] = gradient.astype(smem.dtype)
            for ref in d_weights:
                store(ref.at[column, here], jnp.sum(d_weight, axis=1))
        plgpu.commit_smem()
        for i, columns in enumerate(both):
            plgpu.copy_smem_to_gmem(smem.at[i], d_gate_up.at[rows, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = [jax.ShapeDtypeStruct(gate_up.shape, gate_up.dtype)]
    if row_weights is not None:
        out_type.append(jax.ShapeDtypeStruct((columns_of_up, tiles * ROWS), jnp.float32))
    d_gate_up, *d_weights = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=[
            plgpu.SMEM((3, ROWS, COLUMNS), gate_up.dtype, transforms=any_row(gate_up.dtype)),
            plgpu.Barrier(num_arrivals=3),
        ],
        grid=(tiles, columns_of_up),
        grid_names=("rows", "columns"),
        num_threads=1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    return d_gate_up, None if row_weights is None else jnp.sum(d_weights[0], axis=0)[:tokens]
