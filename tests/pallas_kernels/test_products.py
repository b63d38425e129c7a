"""The FP8 and bfloat16 products, every implementation, against float64 products of the (dequantised) operands."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.gemm import Config

VECTORS = np.load(pathlib.Path(__file__).parents[1] / "data" / "fp8_vectors.npz", allow_pickle=False)
F32 = 3e-6  # relative error allowed with float32 output; with bfloat16 its rounding gives 1.7e-3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def f64(q):
    """What the codes [..., M, K] stand for."""
    scales = np.asarray(q.scales()).repeat(128, -1)[..., : q.shape[-1]]
    scales = scales if q.kind == "tiles" else scales.repeat(128, -2)[..., : q.shape[-2], :]
    return np.asarray(q.values).astype(np.float64) * scales


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def test_dense_equals_the_vectors(implementation):
    a, b = pk.quantize_tiles(jnp.asarray(VECTORS["gemm/gemm_b/a"])), pk.quantize_blocks(jnp.asarray(VECTORS["gemm/gemm_b/b"]))
    want = VECTORS["gemm/gemm_b/c_exact_f64_of_quantised"]
    assert error(implementation("fp8_matmul")(a, b, out_dtype=jnp.float32), want) < F32
    assert error(implementation("fp8_matmul")(a, b), want) < 2e-3


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (1, 64, 128, Config(64, 64, 2)),
        (13, 136, 200, Config(64, 32, 3)),
        (64, 128, 384, Config(64, 56, 2)),  # tiles across the 128-wide scale blocks
        (72, 192, 256, Config(64, 64, 2, split_k=2)),
        (70, 256, 256, Config(64, 96, 2, "n", cluster=2, multicast="a")),
        (130, 200, 384, Config(128, 192, 2, "m")),
        (520, 128, 256, Config(256, 128, 2, "m", cluster=2, multicast="b")),
        (300, 256, 384, Config(128, 256, 2, "n", minor="m", width=8)),
        (200, 256, 640, Config(192, 128, 2, "m", cluster=2)),  # three math warpgroups
        (300, 128, 640, Config(256, 128, 3, "m", ordered=True)),
    ],
)
def test_dense(implementation, m, n, k, config):
    a, b = pk.quantize_tiles(normal(m, k)), pk.quantize_blocks(normal(n, k, seed=1))
    got = implementation("fp8_matmul", config, num_sms=4)(a, b, out_dtype=jnp.float32)
    assert got.shape == (m, n) and error(got, f64(a) @ f64(b).T) < F32


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        ([40, 0, 1, 59], Config(64, 64, 2)),
        ([40, 0, 1, 59], Config(128, 128, 2, "m", cluster=2)),
        ([0, 0, 100, 0], Config(64, 64, 2)),
        ([7, 31, 62, 0], Config(64, 64, 2)),
        ([70, 0, 1, 29], Config(64, 64, 2, cluster=2, multicast="b")),  # pairs of row tiles, whose second may be empty
    ],
)
def test_grouped(implementation, sizes, config):
    a, b = pk.quantize_tiles(normal(100, 200)), pk.quantize_blocks(normal(4, 72, 200, seed=1))
    got = implementation("grouped_fp8_matmul", config)(a, b, np.asarray(sizes, np.int32), out_dtype=jnp.float32)
    group = np.repeat(np.arange(4), sizes)
    assert error(got, np.einsum("mk,mnk->mn", f64(a), f64(b)[group])) < F32


def test_grouped_rows_past_the_groups_are_zero(implementation):
    a, b = pk.quantize_tiles(normal(80, 128)), pk.quantize_blocks(normal(2, 64, 128, seed=1))
    got = implementation("grouped_fp8_matmul")(a, b, np.array([9, 4], np.int32))
    got = np.asarray(got)
    assert np.all(got[13:] == 0) and np.all(np.any(got[:13] != 0, axis=1))


def test_masked(implementation):
    a, b = pk.quantize_tiles(normal(3, 70, 256)), pk.quantize_blocks(normal(3, 72, 256, seed=1))
    counts = np.array([70, 0, 7])
    got = np.asarray(implementation("masked_fp8_matmul")(a, b, counts.astype(np.int32), out_dtype=jnp.float32))
    valid = np.arange(70)[None, :, None] < counts[:, None, None]
    want = np.einsum("grk,gnk->grn", f64(a), f64(b))
    assert error(np.where(valid, got, 0), want * valid) < F32


@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad(implementation, accumulate):
    a, b = pk.quantize_tiles(normal(136, 200)), pk.quantize_tiles(normal(72, 200, seed=1))
    start = normal(136, 72, seed=2) if accumulate else None
    want = f64(a) @ f64(b).T + (np.asarray(start, np.float64) if accumulate else 0)
    config = Config(128, 192, 2, "m") if accumulate else Config(64, 64, 2, cluster=2, multicast="b")  # an odd number of row tiles in pairs
    got = implementation("fp8_wgrad", config)(a, b, start)
    assert got.dtype == jnp.float32 and error(got, want) < F32


def test_tokens_of_a_weight_gradient_are_shared_out(implementation):
    """Five blocks of tokens in three parts of two, two and one, though four were asked for."""
    a, b = pk.quantize_tiles(normal(72, 600)), pk.quantize_tiles(normal(64, 600, seed=1))
    got = implementation("fp8_wgrad", Config(64, 64, 2, split_k=4))(a, b)
    assert got.shape == (72, 64) and error(got, f64(a) @ f64(b).T) < F32


@pytest.mark.parametrize(("sizes", "accumulate"), [([130, 0, 1, 169], False), ([130, 0, 1, 169], True), ([0, 0, 300, 0], False)])
def test_grouped_wgrad_end_to_end(implementation, sizes, accumulate):
    """From row-quantised operands through requantize_transposed, as the backward pass does it, against the unpadded product."""
    sizes = np.asarray(sizes, np.int32)
    dy, x = pk.quantize_tiles(normal(300, 136), pow2=True), pk.quantize_tiles(normal(300, 72, seed=1), pow2=True)
    a, b = pk.requantize_transposed(dy, sizes, pow2=True), pk.requantize_transposed(x, sizes, pow2=True)
    start = normal(4, 136, 72, seed=2) if accumulate else None
    got = np.asarray(implementation("grouped_fp8_wgrad", Config(128, 64, 2, "m"))(a, b, sizes, start))
    ends = np.cumsum(sizes)
    for g, end in enumerate(ends):
        rows = slice(end - sizes[g], end)
        want = f64(dy)[rows].T @ f64(x)[rows] + (np.asarray(start[g], np.float64) if accumulate else 0)
        if sizes[g] or accumulate:
            assert error(got[g], want) < (2e-2 if sizes[g] else 1e-7)  # the second rounding
        else:
            assert np.all(got[g] == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_numbers_stay_in_their_rows_and_columns(implementation, bad):
    x, w = normal(70, 256), normal(256, 256, seed=1)
    x[5, 200] = w[140, 3] = bad
    got = np.asarray(implementation("fp8_matmul")(pk.quantize_tiles(x), pk.quantize_blocks(w), out_dtype=jnp.float32))
    finite = np.isfinite(got)
    assert not finite[5].any() and not finite[:, 140].any()
    assert np.delete(finite, 5, axis=0)[:, :128].all()  # the columns of another scale block


def test_bad_numbers_stay_in_their_group(implementation):
    x = normal(40, 128)
    x[3, 3] = np.nan
    a, b = pk.quantize_tiles(x), pk.quantize_blocks(normal(2, 64, 128, seed=1))
    got = np.asarray(implementation("grouped_fp8_matmul")(a, b, np.array([9, 31], np.int32))).astype(np.float32)
    assert not np.isfinite(got[3]).any() and np.isfinite(np.delete(got, 3, axis=0)).all()


BF16_CONFIGS = [
    Config(64, 64, 3),
    Config(128, 128, 2, "n", cluster=2, multicast="b"),
    Config(256, 128, 2, "m", cluster=2, slots=2),
]


@pytest.mark.parametrize(
    ("sizes", "config", "transposed"),
    list(zip([[100, 0, 43, 0], [0, 79, 0, 1], [0, 0, 150, 0]], BF16_CONFIGS, [True, False, True])),
)
def test_grouped_bf16(implementation, sizes, config, transposed):
    """Widths that are no whole tiles; rows past the groups, which hold NaN, give zeros."""
    n, k = (200, 136) if transposed else (136, 200)
    x, w = normal(150, k).astype(jnp.bfloat16), normal(4, 200, 136, seed=1).astype(jnp.bfloat16)
    x[sum(sizes) :] = np.nan
    got = np.asarray(implementation("grouped_bf16_matmul", config)(x, w, np.asarray(sizes, np.int32), transposed=transposed), np.float64)
    assert got.shape == (150, n) and np.all(got[sum(sizes) :] == 0)
    of_row = np.asarray(w, np.float64)[np.repeat(np.arange(4), sizes)]
    want = np.einsum("mk,mnk->mn" if transposed else "mk,mkn->mn", np.asarray(x, np.float64)[: sum(sizes)], of_row)
    assert error(got[: sum(sizes)], want) < 2e-3


@pytest.mark.parametrize(("sizes", "config"), list(zip([[100, 0, 43, 0], [3, 70, 0, 68], [0, 0, 150, 0]], BF16_CONFIGS)))
def test_grouped_bf16_wgrad(implementation, sizes, config):
    """Groups that begin and end within the kernel's steps of 64 rows."""
    dy, x = normal(150, 136).astype(jnp.bfloat16), normal(150, 72, seed=1).astype(jnp.bfloat16)
    got = np.asarray(implementation("grouped_bf16_wgrad", config)(dy, x, np.asarray(sizes, np.int32)))
    rows = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes))]
    want = np.stack([np.asarray(dy, np.float64)[r].T @ np.asarray(x, np.float64)[r] for r in rows])
    assert got.dtype == np.float32 and got.shape == (4, 136, 72) and error(got, want) < F32
    assert not np.any(got[np.asarray(sizes) == 0])
