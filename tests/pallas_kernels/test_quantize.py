"""The quantise ops against vectors made by other software, and against numpy in float64."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as pk
from pallas_kernels.quantize import hopper

VECTORS = np.load(pathlib.Path(__file__).parents[1] / "data" / "fp8_vectors.npz", allow_pickle=False)
ACTIVATIONS = sorted({key.split("/")[1] for key in VECTORS.files if key.startswith("act/")})
WEIGHTS = sorted({key.split("/")[1] for key in VECTORS.files if key.startswith("weight/")})


def interpreted(op):
    return functools.partial(getattr(hopper, op), interpret=plgpu.InterpretGPUParams())


def codes(q):
    return np.asarray(q.values).view(np.uint8)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("case", ACTIVATIONS)
def test_tiles_equal_the_vectors(case, pow2):
    want = f"act/{case}/{'pow2' if pow2 else 'f32s'}/"
    q = pk.quantize_tiles(jnp.asarray(VECTORS[f"act/{case}/x"]), pow2=pow2)
    np.testing.assert_array_equal(q.scales(), VECTORS[want + "scale"])
    np.testing.assert_array_equal(codes(q), VECTORS[want + "q_u8"])
    if want + "dequant" in VECTORS:
        np.testing.assert_array_equal(q.dequantize(), VECTORS[want + "dequant"])


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("case", WEIGHTS)
def test_blocks_equal_the_vectors(case, pow2):
    want = f"weight/{case}/{'pow2' if pow2 else 'f32s'}/"
    q = pk.quantize_blocks(jnp.asarray(VECTORS[f"weight/{case}/w"]), pow2=pow2)
    np.testing.assert_array_equal(q.scales(), VECTORS[want + "scale_inv"])
    np.testing.assert_array_equal(codes(q), VECTORS[want + "q_u8"])


def numpy_tiles(x, pow2):
    """The formula in numpy's float32, whose division is exact, and ml_dtypes' rounding."""
    groups = np.asarray(x, np.float32).reshape(x.shape[0], -1, 128)
    scales = np.maximum(np.abs(groups).max(-1), np.float32(1e-4)) / np.float32(448)
    scales = 2.0 ** np.ceil(np.log2(scales.astype(np.float64))) if pow2 else scales
    return (groups / scales[..., None].astype(np.float32)).astype(ml_dtypes.float8_e4m3fn).reshape(x.shape), scales


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("run", [pk.quantize_tiles, interpreted("quantize_tiles")], ids=["reference", "hopper"])
def test_tiles_are_exact(run, dtype, pow2):
    """bfloat16 inputs often lie half way between two codes, where a quotient that is one unit off takes the wrong one."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((72, 384)), dtype)
    q, (values, scales) = run(x, pow2=pow2), numpy_tiles(x, pow2)
    np.testing.assert_array_equal(q.scales(), scales)
    np.testing.assert_array_equal(codes(q), values.view(np.uint8))


def close(q, want):
    """Equal to the wanted values within one e4m3 rounding (2^-4 of the value), scales to 1e-5."""
    got = np.asarray(q.dequantize(), np.float64)
    assert np.all(
        np.abs(got - want) <= np.abs(want) * 2**-4 + np.repeat(np.asarray(q.scales()), 128, axis=-1)[..., : want.shape[-1]] * 2**-9
    )


@pytest.mark.parametrize("run", [pk.swiglu_quantize, interpreted("swiglu_quantize")], ids=["reference", "hopper"])
def test_swiglu(run):
    x = np.random.default_rng(0).standard_normal((72, 600))
    gate, up = np.split(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64), 2, axis=-1)
    close(run(jnp.asarray(x, jnp.bfloat16)), gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("run", [pk.rmsnorm_quantize, interpreted("rmsnorm_quantize")], ids=["reference", "hopper"])
def test_rmsnorm(run):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((70, 384)), rng.standard_normal(384)
    want = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
    close(run(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)), want)


@pytest.mark.parametrize("sizes", [None, [130, 0, 1, 69]])
@pytest.mark.parametrize("op", ["requantize_transposed", "quantize_both"])
@pytest.mark.parametrize("find", [functools.partial(getattr, pk), interpreted], ids=["reference", "hopper"])
def test_transposed(find, op, sizes):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((200, 136)), jnp.bfloat16)
    groups = None if sizes is None else jnp.asarray(sizes, jnp.int32)
    if op == "quantize_both":
        rows, q = find(op)(x, groups)
        np.testing.assert_array_equal(codes(rows), codes(pk.quantize_tiles(x)))
        x = np.asarray(x, np.float32)
    else:
        source = pk.quantize_tiles(x)
        q, x = find(op)(source, groups), np.asarray(source.dequantize())
    want = np.zeros((136, q.shape[1]))
    start = row = 0
    for size in sizes or [200]:
        want[:, start : start + size] = x[row : row + size].T
        start, row = start + -(-size // 128) * 128, row + size
    close(q, want)
    values, scales = numpy_tiles(want.astype(np.float32), pow2=False)
    np.testing.assert_array_equal(q.scales(), scales)
    np.testing.assert_array_equal(codes(q), values.view(np.uint8))


def test_leading_axes_and_vmap():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16, 256)), jnp.float32)
    whole, mapped = pk.quantize_tiles(x), jax.vmap(pk.quantize_tiles)(x)
    for q in (whole, mapped):
        np.testing.assert_array_equal(codes(q)[1], codes(pk.quantize_tiles(x[1])))
        np.testing.assert_array_equal(q.scales()[1], pk.quantize_tiles(x[1]).scales())
