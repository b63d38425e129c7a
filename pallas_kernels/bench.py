"""Timing of kernels on the GPU, shared by the ops' bench.py and by `tune`.

Times are those of CUPTI, without launch overhead, and the median of several calls, each after 8 GB were written so that nothing of the
operands is left in L2. Errors are relative to a float32 product of the dequantised operands.

Compiling takes far longer than measuring: `in_processes` spreads a list of measurements over several processes, which compile side by side
and take turns at the GPU.
"""

import contextlib
import functools
import multiprocessing
import os
import statistics
import sys

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels.quantize.reference import quantize_blocks, quantize_tiles

PROCESSES = 16  # at most, for the sake of the GPU's memory
_turn = None  # in a process of `in_processes`: the lock that it holds except while it compiles


def require_hopper():
    if jax.default_backend() != "gpu" or jax.local_devices()[0].compute_capability != "9.0":
        sys.exit("pallas_kernels: benchmarks need an NVIDIA Hopper GPU (sm_90)")


def in_processes(function, tasks):
    """Yields (task, function(task)) for every task, in any order; an exception takes the place of a result that it prevented.

    function, tasks: picklable. Between calls of `compiled` each process has the GPU for itself.
    """
    context = multiprocessing.get_context("spawn")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share the GPU's memory
    todo, done, turn = context.Queue(), context.Queue(), context.Lock()
    workers = [
        context.Process(target=_work, args=(function, todo, done, turn), daemon=True)
        for _ in range(min(os.cpu_count() - 1, PROCESSES, len(tasks)))
    ]
    for task in [*tasks, *(None for _ in workers)]:
        todo.put(task)
    for worker in workers:
        worker.start()
    for _ in tasks:
        yield done.get()
    for worker in workers:
        worker.join()


def _work(function, todo, done, turn):
    global _turn
    _turn = turn
    for task in iter(todo.get, None):
        with turn:
            try:
                result = function(task)
            except Exception as error:  # the others go on; whoever reads the results says which one failed
                result = error
        done.put((task, result))


def compiled(function, *operands):
    """jax.jit(function), compiled for these operands while other processes may use the GPU."""
    if isinstance(function, jax.stages.Compiled):
        return function
    with contextlib.ExitStack() as stack:
        if _turn is not None:
            _turn.release()
            stack.callback(_turn.acquire)
        return jax.jit(function).lower(*operands).compile()


class _AfterFlush:
    """A compiled function that is preceded by a write of 8 GB; a class, because the profiler compiles what does not look compiled."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *operands):
        for _ in range(8):
            _flush(1.0).delete()
        return self.function(*operands)

    def lower(self, *operands):
        return self.function.lower(*operands)

    def trace(self, *operands):
        return self.function.trace(*operands)


@jax.jit
def _flush(x):
    return jnp.full(2**28, x)  # 1 GB


@functools.cache
def _flush_kernels():
    return 8 * len(profiler.measure(_flush, aggregate=False)(1.0)[1])


def microseconds(function, *operands, calls: int = 12) -> float:
    """Median time of function(*operands) on the GPU: the sum of its kernels, with a cold L2."""
    function = compiled(function, *operands)
    flushes = _flush_kernels()
    _, times = profiler.measure(_AfterFlush(function), aggregate=False, iterations=calls)(*operands)
    return statistics.median(1e3 * sum(milliseconds for _, milliseconds in kernels[flushes:]) for kernels in times)


def normal(seed: int, *shape, dtype=jnp.bfloat16):
    return _maker(None, shape, dtype)(jax.random.key(seed))


def tiles(seed: int, *shape):
    return _maker(quantize_tiles, shape, jnp.bfloat16)(jax.random.key(seed))


def blocks(seed: int, *shape):
    return _maker(quantize_blocks, shape, jnp.bfloat16)(jax.random.key(seed))


@functools.cache
def _maker(function, shape, dtype):
    def make(key):
        x = jax.random.normal(key, shape, dtype)
        return x if function is None else function(x)

    return compiled(make, jax.random.key(0))


def relative_error(got, want) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def xla_dots(m: int, n: int, k: int) -> tuple[float, float]:
    """Microseconds of XLA's bfloat16 dot and of its per-tensor fp8 dot of this shape: what one has without these kernels."""

    def dot(a, b):
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    a, b = normal(0, m, k), normal(1, n, k)
    return microseconds(dot, a, b), microseconds(dot, a.astype(jnp.float8_e4m3fn), b.astype(jnp.float8_e4m3fn))


@functools.cache
def copy_rate() -> float:
    """GB/s read and written by a copy of 1 GB on this card."""
    x = jnp.zeros(2**28, jnp.float32)
    return 2 * x.nbytes / microseconds(lambda x: x + 1, x) / 1e3


def table(columns, measure, cases):
    """Prints a row for every case: its entries, then measure(case)."""
    header(*columns)
    results = {}
    for case, result in in_processes(measure, cases):
        results[case] = result
        print(f"measured {len(results)} of {len(cases)}", file=sys.stderr, flush=True)
    for case in cases:
        failed = isinstance(results[case], Exception)
        row(*("" if x is None else x for x in case), *([f"{type(results[case]).__name__}: {results[case]}"] if failed else results[case]))
    if any(isinstance(result, Exception) for result in results.values()):
        sys.exit("some rows could not be measured")


def header(*columns):
    device = jax.local_devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, CUPTI, cold L2, median of 12")
    row(*columns)
    row(*("---" for _ in columns))


def row(*cells):
    print("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)
