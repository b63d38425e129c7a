"""The FP8 products against float64 products of the dequantised operands."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

VECTORS = np.load(pathlib.Path(__file__).parents[1] / "data" / "fp8_vectors.npz", allow_pickle=False)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def f64(q):
    return np.asarray(q.dequantize(), np.float64)


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def test_dense_equals_the_vectors():
    a, b = pk.quantize_tiles(jnp.asarray(VECTORS["gemm/gemm_b/a"])), pk.quantize_blocks(jnp.asarray(VECTORS["gemm/gemm_b/b"]))
    want = VECTORS["gemm/gemm_b/c_exact_f64_of_quantised"]
    assert error(pk.fp8_matmul(a, b, out_dtype=jnp.float32), want) < 3e-6
    assert error(pk.fp8_matmul(a, b), want) < 2e-3


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 128), (33, 136, 200), (130, 200, 384)])
def test_dense(m, n, k):
    a, b = pk.quantize_tiles(normal(m, k)), pk.quantize_blocks(normal(n, k, seed=1))
    assert error(pk.fp8_matmul(a, b, out_dtype=jnp.float32), f64(a) @ f64(b).T) < 3e-6


SIZES = [[40, 0, 1, 59], [0, 0, 100, 0], [100, 0, 0, 0], [25, 25, 25, 25], [0, 0, 0, 100], [7, 31, 62, 0]]


@pytest.mark.parametrize("sizes", SIZES)
def test_grouped(sizes):
    a, b = pk.quantize_tiles(normal(100, 200)), pk.quantize_blocks(normal(4, 72, 200, seed=1))
    got = pk.grouped_fp8_matmul(a, b, jnp.asarray(sizes, jnp.int32), out_dtype=jnp.float32)
    group = np.repeat(np.arange(4), sizes)
    assert error(got, np.einsum("mk,mnk->mn", f64(a), f64(b)[group])) < 3e-6


def test_grouped_rows_past_the_groups_are_zero():
    a, b = pk.quantize_tiles(normal(40, 128)), pk.quantize_blocks(normal(2, 64, 128, seed=1))
    got = jax.jit(pk.grouped_fp8_matmul)(a, b, jnp.asarray([9, 4], jnp.int32))
    assert np.all(np.asarray(got[13:]) == 0) and np.all(np.any(np.asarray(got[:13]) != 0, axis=1))


def test_masked():
    a, b = pk.quantize_tiles(normal(3, 20, 256)), pk.quantize_blocks(normal(3, 72, 256, seed=1))
    counts = np.array([20, 0, 7])
    got = np.asarray(pk.masked_fp8_matmul(a, b, jnp.asarray(counts, jnp.int32), out_dtype=jnp.float32))
    want = np.einsum("grk,gnk->grn", f64(a), f64(b)) * (np.arange(20)[None, :, None] < counts[:, None, None])
    assert error(got, want) < 3e-6
    assert np.all(got[want == 0] == 0)


@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad(accumulate):
    a, b = pk.quantize_tiles(normal(136, 200)), pk.quantize_tiles(normal(72, 200, seed=1))
    start = normal(136, 72, seed=2) if accumulate else None
    want = f64(a) @ f64(b).T + (np.asarray(start, np.float64) if accumulate else 0)
    got = pk.fp8_wgrad(a, b, accumulate=start)
    assert got.dtype == jnp.float32 and error(got, want) < 3e-6


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("sizes", [[130, 0, 1, 169], [0, 0, 300, 0], [300, 0, 0, 0], [128, 128, 44, 0]])
def test_grouped_wgrad_end_to_end(sizes, accumulate):
    """From row-quantised operands through requantize_transposed, as the backward pass does it, against the unpadded product."""
    sizes = jnp.asarray(sizes, jnp.int32)
    dy, x = pk.quantize_tiles(normal(300, 136), pow2=True), pk.quantize_tiles(normal(300, 72, seed=1), pow2=True)
    a, b = pk.requantize_transposed(dy, sizes, pow2=True), pk.requantize_transposed(x, sizes, pow2=True)
    start = normal(4, 136, 72, seed=2) if accumulate else None
    got = np.asarray(pk.grouped_fp8_wgrad(a, b, sizes, accumulate=start))
    ends = np.cumsum(sizes)
    for g, end in enumerate(ends):
        rows = slice(end - sizes[g], end)
        want = f64(dy)[rows].T @ f64(x)[rows] + (np.asarray(start[g], np.float64) if accumulate else 0)
        if sizes[g] or accumulate:
            assert error(got[g], want) < (2e-2 if sizes[g] else 1e-7)  # the second rounding
        else:
            assert np.all(got[g] == 0)
