"""Bad input: a ValueError that names the argument, what it is, and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import platform

E4M3 = jnp.float8_e4m3fn


def tiles(*shape):
    return pk.Quantized.tiles(jnp.zeros(shape, E4M3), jnp.ones((*shape[:-1], -(-shape[-1] // 128))))


def blocks(*shape):
    return pk.Quantized.blocks(jnp.zeros(shape, E4M3), jnp.ones((*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))))


def sizes(*values):
    return jnp.asarray(values, jnp.int32)


BF16 = jnp.zeros((16, 256), jnp.bfloat16)
A, B, BG = tiles(16, 256), blocks(128, 256), blocks(2, 128, 256)

CASES = {
    "values dtype": (
        lambda: pk.Quantized.tiles(jnp.zeros((4, 128)), jnp.ones((4, 1))),
        r"values: expected a float8_e4m3fn .* float32 \[4, 128\]",
    ),
    "scales shape": (
        lambda: pk.Quantized.tiles(jnp.zeros((4, 256), E4M3), jnp.ones((4, 1))),
        r"scales: expected float32 \[4, 2\] .* \[4, 1\]",
    ),
    "scales dtype": (
        lambda: pk.Quantized.blocks(jnp.zeros((4, 256), E4M3), jnp.ones((1, 2), jnp.bfloat16)),
        r"scales: expected float32 \[1, 2\] .* bfloat16",
    ),
    "K not covered": (
        lambda: pk.fp8_matmul(pk.Quantized(A.values, A.stored_scales[:1], "tiles"), B),
        r"a: scales: expected float32 \[16, 2\] .* \[16, 1\]",
    ),
    "not quantised": (lambda: pk.fp8_matmul(jnp.zeros((16, 256)), B), r"a: expected Quantized tiles with 2 axes, got float32 \[16, 256\]"),
    "tiles for blocks": (lambda: pk.fp8_matmul(A, tiles(128, 256)), r"b: expected Quantized blocks .* Quantized tiles \[128, 256\]"),
    "K of b": (lambda: pk.fp8_matmul(A, blocks(128, 128)), r"b: expected \[N, 256\].* \[128, 128\]"),
    "out_dtype": (lambda: pk.fp8_matmul(A, B, out_dtype=jnp.float16), "out_dtype: expected bfloat16 or float32, got float16"),
    "num_sms": (lambda: pk.fp8_matmul(A, B, num_sms=0), "num_sms: expected a positive number .* got 0"),
    "implementation": (lambda: pk.fp8_matmul(A, B, implementation="triton"), "implementation: expected .* got 'triton'"),
    "sum of sizes": (lambda: pk.grouped_fp8_matmul(A, BG, sizes(3, 4)), r"group_sizes: expected .* sum to the 16 rows, .* sum 7"),
    "negative size": (lambda: pk.grouped_fp8_matmul(A, BG, sizes(17, -1)), "group_sizes: expected sizes >= 0"),
    "number of sizes": (lambda: pk.grouped_fp8_matmul(A, BG, sizes(16)), r"group_sizes: expected integers \[2\].* int32 \[1\]"),
    "float sizes": (lambda: pk.grouped_fp8_matmul(A, BG, jnp.ones(2)), r"group_sizes: expected integers \[2\].* float32"),
    "counts": (lambda: pk.masked_fp8_matmul(tiles(2, 8, 256), BG, sizes(9, 0)), "counts: expected counts from 0 to 8"),
    "groups of masked": (lambda: pk.masked_fp8_matmul(tiles(3, 8, 256), BG, sizes(1, 1, 1)), r"b: expected \[3, N, 256\]"),
    "tokens": (lambda: pk.fp8_wgrad(tiles(16, 256), tiles(16, 128)), r"b: expected \[K, 256\], the tokens of a"),
    "accumulate": (
        lambda: pk.fp8_wgrad(tiles(16, 128), tiles(24, 128), accumulate=jnp.zeros((16, 24), jnp.bfloat16)),
        r"accumulate: expected float32 \[16, 24\], got bfloat16",
    ),
    "padded sizes": (
        lambda: pk.grouped_fp8_wgrad(tiles(16, 256), tiles(16, 256), sizes(129, 1)),
        "group_sizes: .* at most 256 tokens .* got 384",
    ),
    "unpadded tokens": (lambda: pk.grouped_fp8_wgrad(tiles(16, 200), tiles(16, 200), sizes(200)), "a: expected tokens in multiples of 128"),
    "float32 operand": (
        lambda: pk.grouped_bf16_matmul(jnp.zeros((16, 128)), jnp.zeros((2, 64, 128), jnp.bfloat16), sizes(9, 7)),
        r"x: expected a bfloat16 array with 2 axes, got float32 \[16, 128\]",
    ),
    "K of w": (
        lambda: pk.grouped_bf16_matmul(BF16, jnp.zeros((2, 64, 256), jnp.bfloat16), sizes(9, 7), transposed=False),
        r"w: expected \[G, 256, N\], the K of x, got bfloat16 \[2, 64, 256\]",
    ),
    "rows of x": (lambda: pk.grouped_bf16_wgrad(BF16, BF16[:8], sizes(9, 7)), r"x: expected \[16, K\], the rows of dy"),
    "too many rows in groups": (
        lambda: pk.grouped_bf16_matmul(BF16, jnp.zeros((2, 64, 256), jnp.bfloat16), sizes(9, 8)),
        r"group_sizes: expected sizes >= 0 of at most 16 rows in all, got int32 \[2\] with sum 17",
    ),
    "no group sizes": (lambda: pk.grouped_bf16_wgrad(BF16, BF16, None), r"group_sizes: expected integers \[G\], got NoneType"),
    "integers": (lambda: pk.quantize_tiles(jnp.zeros((4, 128), jnp.int32)), r"x: expected a floating-point array .* int32 \[4, 128\]"),
    "one axis": (lambda: pk.quantize_tiles(jnp.zeros(128)), r"x: expected .* at least two axes, got float32 \[128\]"),
    "empty": (lambda: pk.quantize_tiles(jnp.zeros((0, 128))), r"x: expected no empty axis"),
    "odd gate_up": (lambda: pk.swiglu_quantize(jnp.zeros((4, 129))), "gate_up: expected an even last axis"),
    "norm weight": (lambda: pk.rmsnorm_quantize(jnp.zeros((4, 128)), jnp.zeros(64)), r"weight: expected \[128\]"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("target", ["cpu", "tpu", "rocm"])
def test_hopper_is_refused_elsewhere(target):
    function = jax.jit(lambda a, b: pk.fp8_matmul(a, b, implementation="hopper"))
    with pytest.raises(ValueError, match=f"fp8_matmul: implementation='hopper' needs an NVIDIA Hopper GPU .* {target}"):
        function.trace(A, B).lower(lowering_platforms=(target,))


def test_hopper_is_refused_when_called_on_a_cpu():
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU"):
        pk.quantize_tiles(jnp.zeros((4, 128)), implementation="hopper")


@pytest.mark.parametrize("implementation", [None, "hopper"])
def test_another_gpu_is_refused(monkeypatch, implementation):
    monkeypatch.setattr(platform, "_local_capabilities", lambda: {"8.0"})
    with pytest.raises(ValueError, match=r"needs an NVIDIA Hopper GPU .* capability 8\.0"):
        jax.jit(lambda a, b: pk.fp8_matmul(a, b, implementation=implementation)).trace(A, B).lower(lowering_platforms=("cuda",))


def test_no_implementation_named_runs_the_reference_on_a_cpu():
    np.testing.assert_array_equal(pk.fp8_matmul(A, B), pk.fp8_matmul(A, B, implementation="reference"))
