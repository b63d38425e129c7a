"""python -m pallas_kernels.wgrad.bench: times the weight gradients, with and without accumulation into a buffer."""

import jax.numpy as jnp

from pallas_kernels import bench
from pallas_kernels.wgrad import fp8_wgrad, grouped_fp8_wgrad, reference, shapes


def main():
    bench.require_hopper()
    bench.header("groups", "N", "K", "tokens", "us", "TFLOP/s", "accumulating: us", "error")
    for n, k, tokens in shapes.DENSE:
        a, b = bench.tiles(0, n, tokens), bench.tiles(1, k, tokens)
        total = jnp.zeros((n, k), jnp.float32)
        measure(1, n, k, tokens, fp8_wgrad, reference.fp8_wgrad, (a, b), total)
    for groups, tokens, n, k in shapes.GROUPED:
        a, b = bench.tiles(0, n, groups * tokens), bench.tiles(1, k, groups * tokens)
        total = jnp.zeros((groups, n, k), jnp.float32)
        sizes = jnp.full(groups, tokens, jnp.int32)
        measure(groups, n, k, groups * tokens, grouped_fp8_wgrad, reference.grouped_fp8_wgrad, (a, b, sizes), total)


def measure(groups, n, k, tokens, op, plain, operands, total):
    us = bench.microseconds(op, *operands)
    adding = bench.microseconds(lambda *args: op(*args[:-1], accumulate=args[-1]), *operands, total)
    bench.row(groups, n, k, tokens, us, 2 * n * k * tokens / us / 1e6, adding, bench.relative_error(op(*operands), plain(*operands)))


if __name__ == "__main__":
    main()
