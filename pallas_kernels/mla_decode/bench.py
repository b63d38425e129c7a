"""python -m pallas_kernels.mla_decode.bench: times `mla_decode` at the shapes FlashMLA was timed at, and at few long and few-headed ones.

Everything is compiled first and measured afterwards, over one pool of pages in random order, of which each shape uses a part: lengths do
not compile anything. `us` is attention and merge, as FlashMLA's times are; `before` is the schedule, which a model of many layers computes
once. `of copy` is the rate at which queries, cache and output are moved, over that of a copy on the same card. Last come errors, and the
times of XLA's own attention over the gathered cache.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench
from pallas_kernels.mla_decode import mla_decode, reference
from pallas_kernels.mla_decode.cache import PAGE_SIZE, encode
from pallas_kernels.mla_decode.shapes import BENCHMARK, Shape

SCALE = 192**-0.5
PAGES, STEP = 128 * 260, 128  # of the pool; pages made at a time, so that nothing much larger than the pool is in memory
WIDTH = {128: 260, 8: 2048, 1: 2048}  # of the page table, by batch size
CHECKED = 64 * PAGE_SIZE  # tokens of a sequence at which the error is measured
COLUMNS = ("batch", "new", "heads", "length", "cache", "us", "before", "TFLOP/s", "TB/s", "of copy", "tokens/us", "FlashMLA", "ratio")


def lengths(shape: Shape):
    """Of the sequences; ragged ones are drawn as FlashMLA's benchmark draws them, and scaled to a mean of `shape.length`."""
    if not shape.ragged:
        return np.full(shape.batch, shape.length, np.int32)
    drawn = np.clip(np.random.default_rng(0).normal(1, 0.5, shape.batch), 0, 2)
    return np.maximum(np.round(drawn / drawn.mean() * shape.length), shape.queries).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def make_pool(fp8):
    """Clipped normal values / 10, as FlashMLA's own benchmark has them."""

    def make(i):
        latent = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (STEP, PAGE_SIZE, 576), jnp.bfloat16)
        latent = jnp.clip(latent / 10, -1, 1)
        return encode(latent) if fp8 else latent

    pool = jax.lax.map(make, jnp.arange(PAGES // STEP))
    return pool.reshape(PAGES, PAGE_SIZE, pool.shape[-1])


@functools.partial(jax.jit, static_argnums=0)
def make_queries(shape):
    return jnp.clip(jax.random.normal(jax.random.key(1), shape, jnp.bfloat16) / 10, -1, 1)


def xla_attention(q, kv_pages, page_table, lengths):
    """What one has without the kernel: bfloat16 products over the gathered cache."""
    kv = kv_pages[page_table].reshape(q.shape[0], -1, q.shape[-1])
    keys, new = jnp.arange(kv.shape[1]), jnp.arange(q.shape[1])
    limits = lengths[:, None] - q.shape[1] + new + 1
    scores = jnp.einsum("bshw,bkw->bshk", q, kv, preferred_element_type=jnp.float32) * SCALE
    weights = jax.nn.softmax(jnp.where((keys < limits[..., None])[:, :, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bshk,bkv->bshv", weights.astype(q.dtype), kv[..., :512])


def program_of(shape: Shape):
    """What is compiled once for all shapes that differ in lengths only."""
    return shape.batch, shape.queries, shape.heads, shape.fp8


def compile_programs(shapes):
    """{program: (decode, reference)}"""
    programs = {}
    for batch, queries, heads, fp8 in dict.fromkeys(map(program_of, shapes)):
        count = min(batch, 2)
        pool = jax.eval_shape(functools.partial(make_pool, fp8))
        q, table, counts = (batch, queries, heads, 576), (batch, WIDTH[batch]), (batch,)
        args = jax.ShapeDtypeStruct(q, jnp.bfloat16), pool, jax.ShapeDtypeStruct(table, jnp.int32), jax.ShapeDtypeStruct(counts, jnp.int32)
        few = [
            jax.ShapeDtypeStruct((count, *q[1:]), jnp.bfloat16),
            pool,
            jax.ShapeDtypeStruct((count, CHECKED // PAGE_SIZE), jnp.int32),
            jax.ShapeDtypeStruct((count,), jnp.int32),
        ]
        plain = functools.partial(reference.mla_decode, softmax_scale=SCALE, out_dtype=jnp.float32)
        decode = jax.jit(functools.partial(mla_decode, softmax_scale=SCALE)).lower(*args).compile()
        programs[batch, queries, heads, fp8] = decode, jax.jit(plain).lower(*few).compile()
    return programs


def operands(shape: Shape, pool):
    table = np.random.default_rng(0).permutation(PAGES).astype(np.int32)[: shape.batch * WIDTH[shape.batch]]
    q = make_queries((shape.batch, shape.queries, shape.heads, 576))
    return q, pool, jnp.asarray(table.reshape(shape.batch, -1)), jnp.asarray(lengths(shape))


def error(programs, shape: Shape, pool):
    """Relative error of the first sequences, cut to some 4,000 tokens, against the float32 reference."""
    decode, plain = programs[program_of(shape)]
    q, _, table, full = operands(shape, pool)
    some = jnp.minimum(full, CHECKED - 27)
    out, _ = decode(q, pool, table, some)
    count = min(shape.batch, 2)
    want, _ = plain(q[:count], pool, table[:count, : CHECKED // PAGE_SIZE], some[:count])
    return bench.relative_error(out[:count], want)


def measure(programs, shape: Shape, pool, copied):
    """A row of the table. copied: GB/s of a copy."""
    args = operands(shape, pool)
    runs = bench.runs(programs[program_of(shape)][0], *args)
    attend = max(range(len(runs[0])), key=lambda i: runs[0][i])  # the attention is the longest kernel
    before, us = (statistics.median(sum(run[part]) for run in runs) for part in (slice(attend), slice(attend, None)))
    tokens = int(lengths(shape).sum())
    work = tokens / (shape.batch * shape.length)  # of a ragged draw, against its mean
    rate = work * shape.bytes / us / 1e6
    ratio = us / shape.flashmla_us if shape.flashmla_us else ""
    length = f"{shape.length} ragged" if shape.ragged else shape.length
    cells = shape.batch, shape.queries, shape.heads, length, "fp8" if shape.fp8 else "bf16"
    return *cells, us, before, work * shape.flops / us / 1e6, rate, 1e3 * rate / copied, tokens / us, shape.flashmla_us or "", ratio


def main():
    bench.require_hopper()
    programs = compile_programs(BENCHMARK)
    copied = bench.copy_rate()
    print(f"copy: {copied:.0f} GB/s read and written")
    bench.header(*COLUMNS)
    for fp8 in (False, True):
        pool = make_pool(fp8)
        for shape in BENCHMARK:
            if shape.fp8 == fp8:
                bench.row(*measure(programs, shape, pool, copied))
        for program in programs:
            if program[3] == fp8:
                print(program, f"error {error(programs, Shape(*program[:3], 4096, fp8=fp8), pool):.2e}")
        if not fp8:
            for shape in BENCHMARK:
                if shape.length == 4096 and not shape.fp8:
                    q, _, table, counts = operands(shape, pool)
                    us = bench.microseconds(xla_attention, q, pool, table[:, : 4096 // PAGE_SIZE], counts, calls=3)
                    print(f"XLA: {us:.0f} us with {shape.batch} x {shape.queries} x {shape.heads} heads, {shape.length} tokens")
        del pool


if __name__ == "__main__":
    main()
