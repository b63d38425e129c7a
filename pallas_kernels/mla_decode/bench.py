"""python -m pallas_kernels.mla_decode.bench: times `mla_decode` at the shapes FlashMLA was timed at, and at few long and few-headed ones.

`us` is all that runs on the GPU: schedule, attention, merge; `schedule` is the first of them by itself, which a model of many layers
computes once. FlashMLA's times are of its attention and combine kernels, so `of FlashMLA` compares us - schedule with them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench
from pallas_kernels.mla_decode import mla_decode, reference
from pallas_kernels.mla_decode.cache import PAGE_SIZE, encode
from pallas_kernels.mla_decode.schedule import make_schedule
from pallas_kernels.mla_decode.shapes import BENCHMARK, Shape
from pallas_kernels.platform import device_sms

SCALE = 192**-0.5


def operands(shape: Shape):
    """Clipped normal values / 10 and pages in random order, as FlashMLA's own benchmark has them."""
    rng = np.random.default_rng(0)
    lengths = np.full(shape.batch, shape.length)
    if shape.ragged:
        lengths = np.maximum(rng.normal(shape.length, shape.length / 2, shape.batch).astype(int), shape.queries)
    pages = -(-int(lengths.max()) // PAGE_SIZE)
    num_pages = shape.batch * pages
    table = rng.permutation(num_pages).reshape(shape.batch, pages).astype(np.int32)
    pool = jnp.clip(bench.normal(0, num_pages, PAGE_SIZE, 576) / 10, -1, 1)
    if shape.fp8:
        pool = jax.lax.map(encode, pool, batch_size=256)
    q = jnp.clip(bench.normal(1, shape.batch, shape.queries, shape.heads, 576) / 10, -1, 1)
    return q, pool, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)


def xla_attention(q, kv_pages, page_table, lengths):
    """What one has without the kernel: bfloat16 products over the gathered cache."""
    kv = kv_pages[page_table].reshape(q.shape[0], -1, q.shape[-1])
    keys, new = jnp.arange(kv.shape[1]), jnp.arange(q.shape[1])
    limits = lengths[:, None] - q.shape[1] + new + 1
    scores = jnp.einsum("bshw,bkw->bshk", q, kv, preferred_element_type=jnp.float32) * SCALE
    weights = jax.nn.softmax(jnp.where((keys < limits[..., None])[:, :, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bshk,bkv->bshv", weights.astype(q.dtype), kv[..., :512])


def error_of_first(q, pool, table, lengths, out, count=4):
    """Relative error of some sequences against the float32 reference."""
    want, _ = reference.mla_decode(q[:count], pool, table[:count], lengths[:count], softmax_scale=SCALE, out_dtype=jnp.float32)
    return bench.relative_error(out[:count], want)


def main():
    bench.require_hopper()
    decode = functools.partial(mla_decode, softmax_scale=SCALE)
    names = ("batch", "new", "heads", "length", "cache")
    bench.header(*names, "us", "schedule", "TFLOP/s", "TB/s", "tokens/us", "FlashMLA us", "of FlashMLA", "of XLA", "error")
    for shape in BENCHMARK:
        args = operands(shape)
        tokens = int(args[3].sum())
        us = bench.microseconds(decode, *args)
        parts = max(1, device_sms() // -(-shape.queries * shape.heads // 64))
        schedule = bench.microseconds(functools.partial(make_schedule, num_parts=parts), args[3])
        work = tokens / (shape.batch * shape.length)  # of a ragged draw, against its mean
        xla = "" if shape.fp8 else us / bench.microseconds(xla_attention, *args, calls=3)
        flashmla = shape.flashmla_us
        ratio = (us - schedule) / flashmla if flashmla else ""
        length = f"{shape.length} ragged" if shape.ragged else shape.length
        cells = (shape.batch, shape.queries, shape.heads, length, "fp8" if shape.fp8 else "bf16")
        rates = (work * shape.flops / us / 1e6, work * shape.bytes / us / 1e6, tokens / us)
        bench.row(*cells, us, schedule, *rates, flashmla or "", ratio, xla, error_of_first(*args, decode(*args)[0]))


if __name__ == "__main__":
    main()
