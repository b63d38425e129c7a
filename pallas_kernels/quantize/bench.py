"""python -m pallas_kernels.quantize.bench: times the quantise ops against a copy on the same card."""

import jax
import jax.numpy as jnp

from pallas_kernels import bench, quantize
from pallas_kernels.quantize import shapes


def main():
    bench.require_hopper()
    source = bench.normal(0, 2**29, dtype=jnp.float32)
    copied = 2 * source.nbytes / bench.microseconds(lambda x: x + 1, source) / 1e3
    del source
    print(f"copy: {copied:.0f} GB/s read and written")
    bench.header("op", "rows", "columns", "us", "GB/s", "of copy")
    for rows, columns in shapes.ROWS_COLS:
        x, weight = bench.normal(0, rows, columns), bench.normal(1, columns)
        q = quantize.quantize_tiles(x)
        for op, operands in (
            (quantize.quantize_tiles, (x,)),
            (quantize.swiglu_quantize, (x,)),
            (quantize.rmsnorm_quantize, (x, weight)),
            (quantize.quantize_both, (x,)),
            (quantize.requantize_transposed, (q,)),
        ):
            moved = size(operands) + size(jax.eval_shape(op, *operands))
            us = bench.microseconds(op, *operands)
            bench.row(op.__name__, rows, columns, us, moved / us / 1e3, moved / us / 1e3 / copied)


def size(tree):
    """Bytes of all arrays of `tree`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
