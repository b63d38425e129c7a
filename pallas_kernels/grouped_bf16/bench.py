"""python -m pallas_kernels.grouped_bf16.bench: times the bfloat16 grouped products beside JAX's Pallas kernels and XLA's dense dot."""

import functools

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

from pallas_kernels import bench
from pallas_kernels.grouped_bf16 import grouped_bf16_matmul, grouped_bf16_wgrad, shapes
from pallas_kernels.grouped_matmul.bench import draw

# of JAX's kernels: the best of those tried on an H200, or near it, everywhere
THEIRS = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 6, "grid_block_n": 8}


def matmul(case):
    groups, rows, n, k, transposed = case
    x, w = bench.normal(0, groups * rows, k), bench.normal(1, groups, *((n, k) if transposed else (k, n)))

    def jax_kernel(x, w, sizes):
        return ragged_dot_mgpu.ragged_dot(x, w, group_sizes=sizes, transpose_rhs=transposed, **THEIRS)

    return _measure(grouped_bf16_matmul, jax_kernel, (x, w), case, transposed=transposed)


def wgrad(case):
    groups, rows, n, k = case
    dy, x = bench.normal(0, groups * rows, n), bench.normal(1, groups * rows, k)

    def jax_kernel(dy, x, sizes):  # rounds to bfloat16, and is to give float32
        return transposed_ragged_dot_mgpu.transposed_ragged_dot(dy, x, group_sizes=sizes, **THEIRS).astype(jnp.float32)

    return _measure(grouped_bf16_wgrad, jax_kernel, (dy, x), case)


def _measure(op, theirs, operands, case, **options):
    groups, rows, n, k, *_ = case
    sizes = jnp.asarray(draw(groups, rows, 0.7, 1.3, total=groups * rows))
    kernel = bench.compiled(functools.partial(op, **options), *operands, sizes)
    us = bench.microseconds(kernel, *operands, sizes)
    theirs = bench.compiled(theirs, *operands, sizes)
    their_us = bench.microseconds(theirs, *operands, sizes)
    apart = bench.relative_error(kernel(*operands, sizes), theirs(*operands, sizes))
    flops = 2 * groups * rows * n * k
    moved = bench.size(operands) + (groups * n * k * 4 if op is grouped_bf16_wgrad else groups * rows * n * 2)
    return us, flops / us / 1e6, moved / us / 1e3, their_us, their_us / us, apart


COLUMNS = ("us", "TFLOP/s", "GB/s", "JAX's kernel: us", "times as fast", "relative difference")
TABLES = (
    ("bfloat16, grouped", ("groups", "mean rows", "N", "K", "w [N, K]", *COLUMNS), matmul, shapes.MATMUL),
    ("bfloat16, grouped weight gradients", ("groups", "mean rows", "N", "K", *COLUMNS), wgrad, shapes.WGRAD),
)

if __name__ == "__main__":
    bench.require_hopper()
    bench.tables(*TABLES)
