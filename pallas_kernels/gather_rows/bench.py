"""python -m pallas_kernels.gather_rows.bench: times gathers of rows against a copy and against XLA's gather on the same card."""

import jax
import jax.numpy as jnp

from pallas_kernels import bench
from pallas_kernels.gather_rows import gather_rows, reference, shapes


def main():
    bench.require_hopper()
    copied = bench.copy_bandwidth()
    bench.header("dtype", "of rows", "rows", "width", "us", "GB/s", "of copy", "XLA us")
    for tokens, rows, width in shapes.ROWS:
        index = jax.random.permutation(jax.random.key(0), jnp.arange(rows, dtype=jnp.int32)) // (rows // tokens)
        for dtype in (jnp.float8_e4m3fn, jnp.bfloat16):
            x = bench.normal(0, tokens, width).astype(dtype)
            us = bench.microseconds(gather_rows, x, index)
            rate = (x.nbytes + rows * width * x.dtype.itemsize) / us / 1e3
            bench.row(dtype.__name__, tokens, rows, width, us, rate, rate / copied, bench.microseconds(reference.gather_rows, x, index))


if __name__ == "__main__":
    main()
