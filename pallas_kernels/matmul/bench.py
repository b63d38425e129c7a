"""python -m pallas_kernels.matmul.bench: times `fp8_matmul` at every shape of shapes.py, with 132 and with 112 SMs."""

import functools
import time

import jax
import jax.numpy as jnp

from pallas_kernels import bench
from pallas_kernels.matmul import fp8_matmul, reference, shapes

# microseconds of DeepGEMM 54e2261 on an H200, measured with a cold L2
DEEPGEMM = {
    (64, 2112, 7168): 10.0,
    (64, 24576, 1536): 16.3,
    (64, 32768, 512): 9.1,
    (64, 7168, 16384): 40.3,
    (64, 4096, 7168): 14.0,
    (64, 7168, 2048): 7.9,
    (128, 2112, 7168): 11.0,
    (128, 24576, 1536): 17.1,
    (128, 32768, 512): 10.5,
    (128, 7168, 16384): 43.4,
    (128, 4096, 7168): 14.0,
    (128, 7168, 2048): 9.3,
    (4096, 2112, 7168): 95,
    (4096, 24576, 1536): 232,
    (4096, 32768, 512): 128,
    (4096, 7168, 16384): 649,
    (4096, 4096, 7168): 168,
    (4096, 7168, 2048): 92,
}


def measure(shape):
    m, n, k = shape
    a, b = bench.tiles(0, m, k), bench.blocks(1, n, k)
    started = time.perf_counter()
    kernel = bench.compiled(fp8_matmul, a, b)
    seconds = time.perf_counter() - started
    us = bench.microseconds(kernel, a, b)
    fewer = bench.microseconds(functools.partial(fp8_matmul, num_sms=112), a, b)
    bf16, fp8 = bench.xla_dots(m, n, k)
    want = bench.compiled(functools.partial(reference.fp8_matmul, out_dtype=jnp.float32), a, b)(a, b)
    error = bench.relative_error(kernel(a, b), want)
    moved = (m * k + n * k + 2 * m * n) / us / 1e3
    rates = us, 2 * m * n * k / us / 1e6, moved, moved / bench.copy_rate()
    return *rates, us / DEEPGEMM[shape] if shape in DEEPGEMM else "", fewer, us / bf16, us / fp8, error, seconds


RATES = ("us", "TFLOP/s", "GB/s", "of copy", "of DeepGEMM", "112 SMs: us", "of xla bf16", "of xla fp8", "error", "compile s")
TABLE = "Dense", ("M", "N", "K", *RATES), measure, shapes.MNK


def sustained(m=4096, n=7168, k=16384, seconds=1.0):
    """Back-to-back calls, long enough for the power limit to bind."""
    a, b = bench.tiles(0, m, k), bench.blocks(1, n, k)
    kernel, calls = bench.compiled(fp8_matmul, a, b), 100
    jax.block_until_ready(kernel(a, b))
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        started = time.perf_counter()
        jax.block_until_ready([kernel(a, b) for _ in range(calls)])
        times.append(time.perf_counter() - started)
    late = sorted(times[len(times) // 2 :])
    print(f"sustained {m}, {n}, {k}: {2 * m * n * k * calls / late[len(late) // 2] / 1e12:.0f} TFLOP/s (DeepGEMM 1264)")


if __name__ == "__main__":
    bench.require_hopper()
    bench.tables(TABLE)
    sustained()
