"""python -m pallas_kernels.grouped_matmul.bench: times the grouped products: equal groups, uneven groups, many ragged groups, decode."""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench
from pallas_kernels.grouped_matmul import grouped_fp8_matmul, masked_fp8_matmul, reference, shapes

# microseconds of DeepGEMM 54e2261 on an H200, measured with a cold L2; equal groups
DEEPGEMM = {
    (4, 8192, 4096, 7168): 1340,
    (4, 8192, 7168, 2048): 722,
    (8, 4096, 4096, 7168): 1349,
    (8, 4096, 7168, 2048): 717,
    (32, 192, 4096, 7168): 373,
    (32, 192, 7168, 2048): 210,
    (32, 20, 4096, 7168): 241,
    (32, 20, 7168, 2048): 133,
}


def draw(groups, mean, low, high, total=None):
    """Sizes uniform from low to high times the mean; with `total`, made to sum to it."""
    sizes = np.random.default_rng(0).uniform(low * mean, high * mean, groups)
    if total is None:
        return sizes.astype(np.int32)
    sizes = np.floor(sizes * (total / sizes.sum())).astype(np.int32)
    sizes[: total - sizes.sum()] += 1
    return sizes


def measure(case):
    groups, rows, room, spread, n, k = case
    op = grouped_fp8_matmul if room is None else functools.partial(masked_fp8_matmul, expected_count=rows)
    sizes = draw(groups, rows, *spread, total=groups * rows if room is None else None)
    a = bench.tiles(0, *([groups * rows] if room is None else [groups, room]), k)
    operands = a, bench.blocks(1, groups, n, k), jnp.asarray(sizes)
    kernel = bench.compiled(op, *operands)
    us = bench.microseconds(kernel, *operands)
    mark = DEEPGEMM.get((groups, rows, n, k))
    total, padded = float(sizes.sum()), float((-(-sizes // 128) * 128).sum())
    rate = (total * k + int((sizes > 0).sum()) * n * k + 2 * total * n) / us / 1e3
    # the float32 weights of 256 groups do not fit
    wrong = error(room is not None, kernel, operands, sizes) if groups < 256 else "not checked"
    flops = 2 * n * k / us / 1e6
    return us, total * flops, padded * flops, rate, rate / bench.copy_rate(), us / mark if mark else "", wrong


def error(masked, kernel, operands, sizes):
    """Relative error of the rows that belong to a group."""
    got = kernel(*operands)
    plain = reference.masked_fp8_matmul if masked else reference.grouped_fp8_matmul
    want = bench.compiled(functools.partial(plain, out_dtype=jnp.float32), *operands)(*operands)
    if masked:
        valid = jnp.arange(got.shape[1])[None, :, None] < jnp.asarray(sizes)[:, None, None]
        got, want = jnp.where(valid, got, 0), jnp.where(valid, want, 0)
    return bench.relative_error(got, want)


def cases():
    for groups, rows, n, k in shapes.GROUPED:
        for spread in [(0, 2)] if groups > 8 else [(1, 1), (0.7, 1.3)]:
            yield groups, rows, None, spread, n, k
    for groups, mean, room, n, k in shapes.MASKED:
        yield groups, mean, room, (0.7, 1.3), n, k


CASE = ("groups", "mean rows", "room", "sizes over mean", "N", "K")
RATES = ("us", "TFLOP/s of rows", "TFLOP/s of rows in 128s", "GB/s", "of copy", "of DeepGEMM (equal)", "error")
TABLE = "Grouped, masked", (*CASE, *RATES), measure, tuple(cases())

if __name__ == "__main__":
    bench.require_hopper()
    bench.tables(TABLE)
