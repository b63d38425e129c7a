"""python -m pallas_kernels.grouped_matmul.bench: times the grouped products: equal groups, uneven groups, many ragged groups, decode."""

import jax
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


def main():
    bench.require_hopper()
    columns = ("us", "TFLOP/s of rows", "TFLOP/s of rows in 128s", "of DeepGEMM (equal)", "error bf16", "error f32")
    bench.header("groups x rows", "sizes", "N", "K", *columns)
    for groups, rows, n, k in shapes.GROUPED:
        b = bench.blocks(1, groups, n, k)
        a = bench.tiles(0, groups * rows, k)
        spreads = {"0 to 2": (0, 2)} if groups > 8 else {"equal": (1, 1), "0.7 to 1.3": (0.7, 1.3)}
        for name, (low, high) in spreads.items():
            sizes = draw(groups, rows, low, high, total=groups * rows)
            measure(
                f"{groups} x {rows}", name, n, k, grouped_fp8_matmul, (a, b, jnp.asarray(sizes)), sizes, DEEPGEMM.get((groups, rows, n, k))
            )
    for groups, mean, rows, n, k in shapes.MASKED:
        a, b = bench.tiles(0, groups, rows, k), bench.blocks(1, groups, n, k)
        counts = draw(groups, mean, 0.7, 1.3)
        mark = DEEPGEMM[groups, mean, n, k]
        measure(f"{groups} x {mean} of {rows}", "masked", n, k, masked_fp8_matmul, (a, b, jnp.asarray(counts)), counts, mark)


def measure(shape, name, n, k, op, operands, sizes, mark):
    us = bench.microseconds(op, *operands)
    padded = (-(-sizes // 128) * 128).sum()
    errors = [error(op, operands, sizes, dtype) for dtype in (jnp.bfloat16, jnp.float32)]
    rates = (2 * float(sizes.sum()) * n * k / us / 1e6, 2 * float(padded) * n * k / us / 1e6)
    bench.row(shape, name, n, k, us, *rates, us / mark if mark else "", *errors)


def error(op, operands, sizes, dtype):
    """Relative error of the rows that belong to a group."""
    got = op(*operands, out_dtype=dtype)
    want = jax.jit(getattr(reference, op.__name__), static_argnames="out_dtype")(*operands, out_dtype=jnp.float32)
    if op is masked_fp8_matmul:
        valid = jnp.arange(got.shape[1])[None, :, None] < jnp.asarray(sizes)[:, None, None]
        got, want = jnp.where(valid, got, 0), jnp.where(valid, want, 0)
    return bench.relative_error(got, want)


if __name__ == "__main__":
    main()
