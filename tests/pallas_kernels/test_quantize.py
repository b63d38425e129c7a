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
from pallas_kernels.quantize.transposed import rows_touched, token_tiles

VECTORS = np.load(pathlib.Path(__file__).parents[1] / "data" / "fp8_vectors.npz", allow_pickle=False)
ACTIVATIONS = sorted({key.split("/")[1] for key in VECTORS.files if key.startswith("act/")})
WEIGHTS = sorted({key.split("/")[1] for key in VECTORS.files if key.startswith("weight/")})


def interpreted(op):
    kernel = functools.partial(getattr(hopper, op), interpret=plgpu.InterpretGPUParams())
    return lambda *operands, **options: jax.jit(functools.partial(kernel, **options))(*operands)


def on_gpu(op):
    return functools.partial(getattr(pk, op), implementation="hopper")


# Functions from the name of an op to the op: the reference, the kernel in the interpreter, the kernel on a GPU.
EVERY = pytest.mark.parametrize(
    "find",
    [
        pytest.param(functools.partial(getattr, pk), id="reference"),
        pytest.param(interpreted, id="hopper"),
        pytest.param(on_gpu, id="gpu", marks=pytest.mark.gpu),
    ],
)
REFERENCE_AND_GPU = pytest.mark.parametrize("find", [*EVERY.args[1][::2]])


dequantized = jax.jit(pk.Quantized.dequantize)


def codes(q):
    return np.asarray(q.values).view(np.uint8)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("case", ACTIVATIONS)
@REFERENCE_AND_GPU
def test_tiles_equal_the_vectors(find, case, pow2):
    want = f"act/{case}/{'pow2' if pow2 else 'f32s'}/"
    q = find("quantize_tiles")(jnp.asarray(VECTORS[f"act/{case}/x"]), pow2=pow2)
    np.testing.assert_array_equal(q.scales(), VECTORS[want + "scale"])
    np.testing.assert_array_equal(codes(q), VECTORS[want + "q_u8"])
    if want + "dequant" in VECTORS:
        np.testing.assert_array_equal(dequantized(q), VECTORS[want + "dequant"])


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
@EVERY
def test_tiles_are_exact(find, dtype, pow2):
    """bfloat16 inputs often lie half way between two codes, where a quotient that is one unit off takes the wrong one."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((72, 384)), dtype)
    q, (values, scales) = find("quantize_tiles")(x, pow2=pow2), numpy_tiles(x, pow2)
    np.testing.assert_array_equal(q.scales(), scales)
    np.testing.assert_array_equal(codes(q), values.view(np.uint8))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_blocks_are_exact(dtype, pow2):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((200, 300)), dtype)
    q, (values, scales) = pk.quantize_blocks(w, pow2=pow2), numpy_blocks(w, pow2)
    np.testing.assert_array_equal(q.scales(), scales)
    np.testing.assert_array_equal(codes(q), values.view(np.uint8))


@pytest.mark.gpu
def test_blocks_on_a_gpu():
    """Whose division may be two units off: then a few codes are their neighbours'."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((1000, 1000)), jnp.float32)
    q, (values, scales) = jax.jit(pk.quantize_blocks)(w), numpy_blocks(w, False)
    np.testing.assert_allclose(q.scales(), scales, rtol=3e-7)
    apart = np.abs(codes(q).astype(int) - values.view(np.uint8).astype(int))
    assert apart.max() <= 1 and np.mean(apart) < 1e-4


def numpy_blocks(w, pow2):
    (n, k), (nb, kb) = w.shape, (-(-size // 128) for size in w.shape)
    blocks = np.zeros((nb * 128, kb * 128), np.float32)
    blocks[:n, :k] = w
    blocks = blocks.reshape(nb, 128, kb, 128)
    scales = np.abs(blocks).max((1, 3)) / np.float32(448)
    scales = (2.0 ** np.ceil(np.log2(scales.astype(np.float64)))).astype(np.float32) if pow2 else scales
    return (blocks / scales[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn).reshape(nb * 128, kb * 128)[:n, :k], scales


def close(q, want):
    """Equal to the wanted values within one e4m3 rounding (2^-4 of the value), scales to 1e-5."""
    got = np.asarray(dequantized(q), np.float64)
    assert np.all(
        np.abs(got - want) <= np.abs(want) * 2**-4 + np.repeat(np.asarray(q.scales()), 128, axis=-1)[..., : want.shape[-1]] * 2**-9
    )


@EVERY
def test_swiglu(find):
    x = np.random.default_rng(0).standard_normal((72, 600))
    gate, up = np.split(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64), 2, axis=-1)
    close(find("swiglu_quantize")(jnp.asarray(x, jnp.bfloat16)), gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("width", [512, 400])
@EVERY
def test_swiglu_and_its_input_at_once(find, width):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((72, width)), jnp.bfloat16)
    hidden, kept = find("swiglu_quantize_both")(x, pow2=True)
    np.testing.assert_array_equal(codes(hidden), codes(find("swiglu_quantize")(x, pow2=True)))
    np.testing.assert_array_equal(codes(kept), codes(pk.quantize_tiles(x)))
    np.testing.assert_array_equal(kept.scales(), pk.quantize_tiles(x).scales())


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sizes", [None, [130, 0, 1, 69]])
@EVERY
def test_swiglu_backward(find, sizes, weighted):
    """Against numpy in float64, by the derivative's definition; hidden by the codes of what it should be."""
    rng, tokens = np.random.default_rng(0), sum(sizes or [200])
    q = pk.quantize_tiles(jnp.asarray(rng.standard_normal((tokens, 256)) * 3, jnp.bfloat16))
    dy = jnp.asarray(rng.standard_normal((tokens, 128)), jnp.bfloat16)
    weights = jnp.asarray(rng.uniform(0.1, 1, tokens), jnp.float32) if weighted else None
    groups = None if sizes is None else jnp.asarray(sizes, jnp.int32)
    d_gate_up, hidden, d_weights = find("swiglu_backward")(q, dy, weights, groups)

    gate, up = np.split(np.asarray(dequantized(q), np.float64), 2, axis=-1)
    d, w = np.asarray(dy, np.float64), np.asarray(weights, np.float64)[:, None] if weighted else 1.0
    silu = lambda gate: gate / (1 + np.exp(-gate))  # noqa: E731
    step = 1e-5
    d_gate = d * w * up * (silu(gate + step) - silu(gate - step)) / (2 * step)
    want = np.concatenate([d_gate, d * w * silu(gate)], axis=-1)
    np.testing.assert_allclose(np.asarray(d_gate_up, np.float64), want, rtol=2**-7, atol=1e-5)
    if weighted:
        np.testing.assert_allclose(d_weights, np.sum(d * silu(gate) * up, axis=-1), rtol=1e-4, atol=1e-3)
    else:
        assert d_weights is None
    laid_out = np.zeros((128, hidden.shape[1]))
    start = row = 0
    for size in sizes or [tokens]:
        laid_out[:, start : start + size] = (w * silu(gate) * up)[row : row + size].T
        start, row = start + -(-size // 128) * 128, row + size
    got = np.asarray(dequantized(hidden), np.float64)
    assert np.all(np.abs(got - laid_out) <= np.abs(laid_out) * (2**-4 + 2**-7) + np.repeat(hidden.scales(), 128, axis=-1) * 2**-9)


@EVERY
def test_rmsnorm(find):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((70, 384)), rng.standard_normal(384)
    want = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
    close(find("rmsnorm_quantize")(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)), want)


@pytest.mark.parametrize("sizes", [None, [130, 0, 1, 69]])
@pytest.mark.parametrize("op", ["requantize_transposed", "quantize_both"])
@EVERY
def test_transposed(find, op, sizes):
    tokens = sum(sizes or [200])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, 136)), jnp.bfloat16)
    groups = None if sizes is None else jnp.asarray(sizes, jnp.int32)
    if op == "quantize_both":
        rows, q = find(op)(x, groups)
        np.testing.assert_array_equal(codes(rows), codes(pk.quantize_tiles(x)))
        np.testing.assert_array_equal(rows.scales(), pk.quantize_tiles(x).scales())
        x = np.asarray(x, np.float32)
    else:
        source = pk.quantize_tiles(x)
        q, x = find(op)(source, groups), np.asarray(dequantized(source))
    want = np.zeros((136, q.shape[1]))
    start = row = 0
    for size in sizes or [tokens]:
        want[:, start : start + size] = x[row : row + size].T
        start, row = start + -(-size // 128) * 128, row + size
    close(q, want)
    values, scales = numpy_tiles(want.astype(np.float32), pow2=False)
    np.testing.assert_array_equal(q.scales(), scales)
    np.testing.assert_array_equal(codes(q), values.view(np.uint8))


MANY_GROUPS = {  # 3,072 tokens, a multiple of 128, as in training: the results have no room behind them
    "of_many_sizes": [128] * 8 + [0] * 7 + [1, 127, 129, 255, 0, 383, 513, 640],
    "one_has_all": [0] * 5 + [3072] + [0] * 30,
}


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", MANY_GROUPS.values(), ids=MANY_GROUPS)
def test_many_groups_on_a_gpu(sizes):
    test_transposed(on_gpu, "requantize_transposed", sizes)
    test_transposed(on_gpu, "quantize_both", sizes)
    test_swiglu_backward(on_gpu, sizes, True)


@EVERY
def test_rows_of_no_group_are_quantised_by_rows(find):
    x, sizes = jnp.asarray(np.random.default_rng(0).standard_normal((300, 128)), jnp.bfloat16), jnp.asarray([3, 0, 130], jnp.int32)
    rows, by_tokens = jax.jit(find("quantize_both"))(x, sizes)  # outside of jit sizes must add up
    np.testing.assert_array_equal(codes(rows), codes(pk.quantize_tiles(x)))
    np.testing.assert_array_equal(rows.scales(), pk.quantize_tiles(x).scales())
    assert not np.any(codes(by_tokens)[:, 3:128]) and not np.any(codes(by_tokens)[:, 128 + 130 :])


@EVERY
def test_tiles_without_tokens_touch_no_other_row(find):
    """The result has room for fifteen empty groups, whose scales belong nowhere, least of all to the first rows of the next columns."""
    x, sizes = jnp.asarray(np.random.default_rng(0).standard_normal((256, 256)), jnp.bfloat16), jnp.asarray([256] + [0] * 15, jnp.int32)
    rows, by_tokens = find("quantize_both")(x, sizes)
    np.testing.assert_array_equal(rows.scales(), pk.quantize_tiles(x).scales())
    np.testing.assert_array_equal(codes(by_tokens)[:, :256], codes(pk.quantize_tiles(x.T)))
    first, _ = token_tiles(256, sizes).T
    assert np.all(first + 128 <= rows_touched(256, sizes))


@EVERY
def test_floor_of_gradients(find):
    """Scaled by a power of two, with a floor scaled alike, the codes are the same."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 256)), jnp.bfloat16)
    for got, want in zip(find("quantize_both")(x * 2.0**-40, floor=1e-4 * 2.0**-40), pk.quantize_both(x)):
        np.testing.assert_array_equal(codes(got), codes(want))
        np.testing.assert_array_equal(got.scales() * 2.0**40, want.scales())


def test_leading_axes_and_vmap():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16, 256)), jnp.float32)
    whole, mapped = pk.quantize_tiles(x), jax.vmap(pk.quantize_tiles)(x)
    for q in (whole, mapped):
        np.testing.assert_array_equal(codes(q)[1], codes(pk.quantize_tiles(x[1])))
        np.testing.assert_array_equal(q.scales()[1], pk.quantize_tiles(x[1]).scales())
