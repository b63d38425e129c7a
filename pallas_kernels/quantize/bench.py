"""python -m pallas_kernels.quantize.bench: times the quantise ops against a copy on the same card."""

import jax
import jax.numpy as jnp

from pallas_kernels import bench, quantize
from pallas_kernels.quantize import shapes


def main():
    bench.require_hopper()
    copied = bench.copy_bandwidth()
    bench.header("op", "rows", "columns", "us", "GB/s", "of copy")
    for rows, columns in shapes.ROWS_COLS:
        x, weight = bench.normal(0, rows, columns), bench.normal(1, columns)
        q = jax.jit(quantize.quantize_tiles)(x)
        sizes = jnp.asarray([rows // 4 - 5, rows // 4 + 70, rows // 4 - 65, rows // 4], jnp.int32)
        for op, operands in (
            (quantize.quantize_tiles, (x,)),
            (quantize.quantize_blocks, (x.astype(jnp.float32),)),
            (quantize.swiglu_quantize, (x,)),
            (quantize.swiglu_quantize_both, (x,)),
            (quantize.swiglu_backward, (q, x[:, : columns // 2], jnp.ones(rows), sizes)),
            (quantize.rmsnorm_quantize, (x, weight)),
            (quantize.quantize_both, (x, sizes)),
            (quantize.requantize_transposed, (q, sizes)),
        ):
            moved = bench.size(operands) + bench.size(jax.eval_shape(op, *operands))
            us = bench.microseconds(op, *operands)
            bench.row(op.__name__, rows, columns, us, moved / us / 1e3, moved / us / 1e3 / copied)


if __name__ == "__main__":
    main()
