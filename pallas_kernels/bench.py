"""Timing of kernels on the GPU, shared by the ops' bench.py and by `tune`.

Times are those of CUPTI, without launch overhead, and the median of several calls, each after 2 GB were written so that nothing of the
operands is left in L2. Errors are relative to a float32 product of the dequantised operands.
"""

import statistics
import sys

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels.quantize.reference import quantize_blocks, quantize_tiles


def require_hopper():
    if jax.default_backend() != "gpu" or jax.local_devices()[0].compute_capability != "9.0":
        sys.exit("pallas_kernels: benchmarks need an NVIDIA Hopper GPU (sm_90)")


class _AfterFlush:
    """A jitted function that is preceded by a write of 2 GB; a class, because the profiler compiles what does not look compiled."""

    def __init__(self, function):
        self.function = function
        self.flush = jax.jit(lambda x: jnp.full(2**29, x))
        self.lower, self.trace = function.lower, function.trace

    def __call__(self, *operands):
        self.flush(1.0).delete()
        return self.function(*operands)


def microseconds(function, *operands, calls: int = 12) -> float:
    """Median time of function(*operands) on the GPU: the sum of its kernels, with a cold L2."""
    function = _AfterFlush(jax.jit(function))
    flushes = len(profiler.measure(function.flush, aggregate=False)(1.0)[1])
    times = []
    for _ in range(calls):
        _, kernels = profiler.measure(function, aggregate=False)(*operands)
        times.append(1e3 * sum(milliseconds for _, milliseconds in kernels[flushes:]))
    return statistics.median(times)


def normal(seed: int, *shape, dtype=jnp.bfloat16):
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, dtype))()


def tiles(seed: int, *shape):
    return jax.jit(quantize_tiles)(normal(seed, *shape))


def blocks(seed: int, *shape):
    return jax.jit(quantize_blocks)(normal(seed, *shape))


def relative_error(got, want) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def xla_dots(m: int, n: int, k: int) -> tuple[float, float]:
    """Microseconds of XLA's bfloat16 dot and of its per-tensor fp8 dot of this shape: what one has without these kernels."""

    def dot(a, b):
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    a, b = normal(0, m, k), normal(1, n, k)
    return microseconds(dot, a, b), microseconds(dot, a.astype(jnp.float8_e4m3fn), b.astype(jnp.float8_e4m3fn))


def header(*columns):
    device = jax.local_devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, CUPTI, cold L2, median of 12")
    row(*columns)
    row(*("---" for _ in columns))


def row(*cells):
    print("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)
