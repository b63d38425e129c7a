"""Timing of kernels on the GPU, shared by the ops' bench.py and by `tune`.

Times are those of CUPTI, without launch overhead, and the median of several calls, each after 4 GB were read and written in
place, so that nothing of the operands is left in L2. Errors are relative to a float32 product of the dequantised operands.

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
    """Called first by every command that measures."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave memory to the processes of `in_processes`
    if jax.default_backend() != "gpu" or jax.local_devices()[0].compute_capability != "9.0":
        sys.exit("pallas_kernels: benchmarks need an NVIDIA Hopper GPU (sm_90)")


def in_processes(function, tasks):
    """Yields (task, function(task)) for every task, in any order; an exception takes the place of a result that it prevented.

    function, tasks: picklable. Between calls of `compiled` each process has the GPU for itself.
    """
    context = multiprocessing.get_context("spawn")
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"  # the processes share the GPU's memory: none keeps what it does not use
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
    """A compiled function that is preceded by writes; a class, because the profiler compiles what does not look compiled."""

    def __init__(self, function=None):
        self.function, self.buffer = function, jnp.zeros(2**28, jnp.float32)  # 1 GB

    def __call__(self, *operands):
        for _ in range(4):
            self.buffer = _write(self.buffer)
        return self.buffer if self.function is None else self.function(*operands)

    def lower(self, *operands):
        return self.function.lower(*operands)

    def trace(self, *operands):
        return self.function.trace(*operands)


_write = jax.jit(lambda x: x + 1, donate_argnums=0)


@functools.cache
def _flush_kernels():
    return len(profiler.measure(_AfterFlush(), aggregate=False)()[1])


def runs(function, *operands, calls: int = 12) -> list[list[float]]:
    """Microseconds of every kernel of function(*operands), in order, with a cold L2: one list for each call."""
    function = compiled(function, *operands)
    flushes = _flush_kernels()
    _, times = profiler.measure(_AfterFlush(function), aggregate=False, iterations=calls)(*operands)
    return [[1e3 * milliseconds for _, milliseconds in kernels[flushes:]] for kernels in times]


def microseconds(function, *operands, calls: int = 12) -> float:
    """Median time of function(*operands) on the GPU: the sum of its kernels, with a cold L2."""
    return statistics.median(map(sum, runs(function, *operands, calls=calls)))


def copy_bandwidth() -> float:
    """GB/s of this card, read and written, printed."""
    source = normal(0, 2**29, dtype=jnp.float32)
    copied = 2 * source.nbytes / microseconds(lambda x: x + 1, source) / 1e3
    print(f"copy: {copied:.0f} GB/s read and written")
    return copied


def size(tree) -> int:
    """Bytes of all arrays of `tree`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


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


def tables(*wanted):
    """Prints tables of (title, columns, measure, cases): a row for every case, its entries and then measure(case)."""
    tasks = [(measure, case) for _, _, measure, cases in wanted for case in cases]
    results = {}
    for task, result in in_processes(_call, tasks):
        results[task] = result
        print(f"{len(results)} of {len(tasks)}:", task[1], result, file=sys.stderr, flush=True)
    for title, columns, measure, cases in wanted:
        print(f"\n{title}: ", end="")
        header(*columns)
        for case in cases:
            result = results[measure, case]
            cells = [f"{type(result).__name__}: {result}"[:300]] if isinstance(result, Exception) else result
            row(*("" if x is None else x for x in case), *cells)
    if any(isinstance(result, Exception) for result in results.values()):
        sys.exit("some rows could not be measured")


def _call(task):
    measure, case = task
    return measure(case)


def header(*columns):
    device = jax.local_devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, CUPTI, cold L2, median of 12")
    row(*columns)
    row(*("---" for _ in columns))


def row(*cells):
    print("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)
