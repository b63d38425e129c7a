"""python -m pallas_kernels.wgrad.bench: times the weight gradients, with and without accumulation into a buffer."""

import jax.numpy as jnp

from pallas_kernels import bench
from pallas_kernels.wgrad import fp8_wgrad, grouped_fp8_wgrad, reference, shapes


def measure(case):
    groups, tokens, n, k = case
    operands = bench.tiles(0, n, groups * tokens), bench.tiles(1, k, groups * tokens)
    op, plain, total = fp8_wgrad, reference.fp8_wgrad, jnp.zeros((n, k), jnp.float32)
    if groups > 1:
        op, plain, total = grouped_fp8_wgrad, reference.grouped_fp8_wgrad, jnp.zeros((groups, n, k), jnp.float32)
        operands += (jnp.full(groups, tokens, jnp.int32),)
    kernel = bench.compiled(op, *operands)
    us = bench.microseconds(kernel, *operands)
    adding = bench.microseconds(lambda *args: op(*args[:-1], accumulate=args[-1]), *operands, total)
    error = bench.relative_error(kernel(*operands), bench.compiled(plain, *operands)(*operands))
    return us, 2 * n * k * groups * tokens / us / 1e6, adding, error


CASES = (*((1, tokens, n, k) for n, k, tokens in shapes.DENSE), *shapes.GROUPED)
TABLE = "Weight gradients", ("groups", "tokens of each", "N", "K", "us", "TFLOP/s", "accumulating: us", "error"), measure, CASES

if __name__ == "__main__":
    bench.require_hopper()
    bench.tables(TABLE)
