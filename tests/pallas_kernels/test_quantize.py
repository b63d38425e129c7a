"""The quantise ops against vectors made by other software, and against numpy in float64."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

VECTORS = np.load(pathlib.Path(__file__).parents[1] / "data" / "fp8_vectors.npz", allow_pickle=False)
ACTIVATIONS = sorted({key.split("/")[1] for key in VECTORS.files if key.startswith("act/")})
WEIGHTS = sorted({key.split("/")[1] for key in VECTORS.files if key.startswith("weight/")})


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
