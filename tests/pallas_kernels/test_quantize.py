"""The quantise ops against vectors made by other software, and against numpy in float64."""

import functools
import pathlib

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
