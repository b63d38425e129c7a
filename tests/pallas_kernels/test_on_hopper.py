"""On a Hopper GPU (-m gpu): the kernels against float32 products at DeepSeek-V3's shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import bench, tuning
from pallas_kernels.grouped_matmul import hopper as grouped_hopper
from pallas_kernels.grouped_matmul import reference as grouped_reference
from pallas_kernels.matmul import reference as dense_reference
from pallas_kernels.matmul import shapes
from pallas_kernels.wgrad import reference as wgrad_reference

pytestmark = pytest.mark.gpu
LIMIT = {jnp.bfloat16: 2e-3, jnp.float32: 3e-4}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("m", "n", "k"), [*shapes.MNK, (13, 200, 300), (1000, 2112, 7168)])
def test_dense(m, n, k, dtype):
    a, b = bench.tiles(0, m, k), bench.blocks(1, n, k)
    want = dense_reference.fp8_matmul(a, b, out_dtype=jnp.float32)
    for sms in (None, 112):
        got = pk.fp8_matmul(a, b, out_dtype=dtype, num_sms=sms, implementation="hopper")
        assert bench.relative_error(got, want) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("sizes", [[1000, 0, 1, 3095], [0, 4096, 0, 0], [1024] * 4, [7, 127, 129, 3833]])
def test_grouped(sizes, dtype):
    a, b = bench.tiles(0, 4096, 2048), bench.blocks(1, 4, 7168, 2048)
    sizes = jnp.asarray(sizes, jnp.int32)
    want = jax.jit(functools.partial(grouped_reference.grouped_fp8_matmul, out_dtype=jnp.float32))(a, b, sizes)
    assert bench.relative_error(pk.grouped_fp8_matmul(a, b, sizes, out_dtype=dtype), want) < LIMIT[dtype]


@pytest.mark.parametrize(("rows", "n", "k"), [(6, 2816, 2048), (384, 2048, 1408), (384, 512, 256)])
def test_grouped_few_rows(rows, n, k):
    """As in decoding: fewer rows a group than a tile has, so that all of them are stored one by one."""
    rng = np.random.default_rng(rows)
    sizes = jnp.asarray(np.bincount(rng.integers(0, 64, rows), minlength=64), jnp.int32)
    a, b = bench.tiles(0, rows, k), bench.blocks(1, 64, n, k)
    want = jax.jit(functools.partial(grouped_reference.grouped_fp8_matmul, out_dtype=jnp.float32))(a, b, sizes)
    assert bench.relative_error(pk.grouped_fp8_matmul(a, b, sizes), want) < 2e-3


def test_grouped_rows_past_the_groups_are_zero():
    a, b = bench.tiles(0, 4096, 2048), bench.blocks(1, 4, 7168, 2048)
    got = jax.jit(pk.grouped_fp8_matmul)(a, b, jnp.asarray([100, 0, 3, 1000], jnp.int32))
    assert not np.any(np.asarray(got[1103:].astype(jnp.float32)))


def test_masked():
    a, b = bench.tiles(0, 8, 256, 2048), bench.blocks(1, 8, 7168, 2048)
    counts = jnp.asarray([256, 0, 1, 64, 65, 130, 7, 255], jnp.int32)
    valid = jnp.arange(256)[None, :, None] < counts[:, None, None]
    got = jnp.where(valid, pk.masked_fp8_matmul(a, b, counts), 0)
    assert bench.relative_error(got, grouped_reference.masked_fp8_matmul(a, b, counts, out_dtype=jnp.float32)) < 2e-3
    jax.block_until_ready(pk.masked_fp8_matmul(a, b, counts * 0))  # nothing to do, and nothing to stand still at


@pytest.mark.parametrize("config", tuning.candidates("masked_matmul", 128), ids=lambda c: f"{c.tile_m}x{c.tile_n}")
def test_masked_with_warpgroups_that_have_no_rows(config):
    """Twenty times: three warpgroups of 64 rows once stood still here, one of them waiting for a phase that had passed."""
    a, b = bench.tiles(0, 32, 512, 2048), bench.blocks(1, 32, 7168, 2048)
    counts = jnp.asarray(np.random.default_rng(0).integers(134, 250, 32), jnp.int32)
    valid = jnp.arange(512)[None, :, None] < counts[:, None, None]
    kernel = jax.jit(functools.partial(grouped_hopper.masked_fp8_matmul, config=config))
    for _ in range(20):
        got = jax.block_until_ready(kernel(a, b, counts))
    assert bench.relative_error(jnp.where(valid, got, 0), grouped_reference.masked_fp8_matmul(a, b, counts, out_dtype=jnp.float32)) < 2e-3


@pytest.mark.parametrize("sizes", [[1000, 0, 1, 3095], [0, 4096, 0, 0], [1024] * 4, [7, 127, 129, 3000]])
def test_grouped_bf16(sizes):
    """The products of one layer's forward and backward pass, against float64 on the host."""
    total = sum(sizes)
    x, w, dy = bench.normal(0, 4096, 512), bench.normal(1, 4, 384, 512), bench.normal(2, 4096, 384)
    rows = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes))]
    f64 = [np.asarray(value.astype(jnp.float32), np.float64) for value in (x, w, dy)]
    y = np.concatenate([f64[0][r] @ f64[1][g].T for g, r in enumerate(rows)])
    dx = np.concatenate([f64[2][r] @ f64[1][g] for g, r in enumerate(rows)])
    dw = np.stack([f64[2][r].T @ f64[0][r] for r in rows])
    sizes = jnp.asarray(sizes, jnp.int32)
    for got, want in ((pk.grouped_bf16_matmul(x, w, sizes), y), (pk.grouped_bf16_matmul(dy, w, sizes, transposed=False), dx)):
        got = np.asarray(got.astype(jnp.float32))
        assert np.linalg.norm(got[:total] - want) < 2e-3 * np.linalg.norm(want) and not np.any(got[total:])
    got = np.asarray(pk.grouped_bf16_wgrad(dy, x, sizes))
    assert np.linalg.norm(got - dw) < 1e-5 * np.linalg.norm(dw)


def test_products_under_vmap():
    sizes = jnp.asarray([[100, 156], [256, 0], [7, 249]], jnp.int32)
    a, b, stacked = bench.tiles(0, 3, 256, 512), bench.blocks(1, 3, 384, 512), bench.blocks(1, 3, 2, 384, 512)
    for op, *operands in [
        (pk.fp8_matmul, a, b),
        (pk.grouped_fp8_matmul, a, stacked, sizes),
        (pk.masked_fp8_matmul, bench.tiles(0, 3, 2, 256, 512), stacked, jnp.full((3, 2), 256, jnp.int32)),
        (pk.fp8_wgrad, a, bench.tiles(1, 3, 384, 512)),
    ]:
        got = jax.jit(jax.vmap(op))(*operands)
        for i in range(3):
            one = jax.tree.map(lambda x, i=i: x[i], operands)
            np.testing.assert_array_equal(np.asarray(got[i].astype(jnp.float32)), np.asarray(jax.jit(op)(*one).astype(jnp.float32)))


@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad(accumulate):
    sizes = jnp.asarray([1000, 0, 1, 3095], jnp.int32)
    a, b = (pk.requantize_transposed(bench.tiles(seed, 4096, width), sizes) for seed, width in ((0, 4096), (1, 2048)))
    start = bench.normal(2, 4, 4096, 2048, dtype=jnp.float32) if accumulate else None
    want = wgrad_reference.grouped_fp8_wgrad(a, b, sizes, start)
    assert bench.relative_error(pk.grouped_fp8_wgrad(a, b, sizes, accumulate=start), want) < 3e-4
    start = None if start is None else start[0]
    assert bench.relative_error(pk.fp8_wgrad(a, b, accumulate=start), wgrad_reference.fp8_wgrad(a, b, start)) < 3e-4


def test_wgrad_of_an_odd_number_of_row_tiles():
    """2112 rows are 17 tiles of 128 for pairs of CTAs: the last was once added twice."""
    a, b, start = bench.tiles(0, 2112, 8192), bench.tiles(1, 7168, 8192), bench.normal(2, 2112, 7168, dtype=jnp.float32)
    want = wgrad_reference.fp8_wgrad(a, b, start)
    assert bench.relative_error(pk.fp8_wgrad(a, b, accumulate=start)[2048:], want[2048:]) < 3e-4


def test_a_nan_stays_in_its_row():
    a, b = bench.normal(0, 256, 2048).at[5, 7].set(jnp.nan), bench.blocks(1, 7168, 2048)
    finite = np.isfinite(np.asarray(pk.fp8_matmul(pk.quantize_tiles(a), b).astype(jnp.float32)))
    assert not finite[5].any() and np.delete(finite, 5, axis=0).all()
