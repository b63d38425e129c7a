"""cross_entropy_gradient against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as pk
from pallas_kernels import aot
from pallas_kernels.cross_entropy import hopper, reference

INTERPRETED = functools.partial(hopper.cross_entropy_gradient, dtype=jnp.bfloat16, interpret=plgpu.InterpretGPUParams())
ON_GPU = functools.partial(pk.cross_entropy_gradient, implementation="hopper")
PART = hopper.PART


def in_float64(logits, targets, weights):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    gradient = np.exp(logits - lse)
    gradient[np.arange(len(logits)), targets] -= 1
    return gradient * np.asarray(weights, np.float64)[:, None], lse[:, 0]


@pytest.mark.parametrize(
    "function", [pk.cross_entropy_gradient, INTERPRETED, pytest.param(ON_GPU, marks=pytest.mark.gpu)], ids=["reference", "hopper", "gpu"]
)
def test_gradient_and_log_sum_exp(function):
    rng, width = np.random.default_rng(0), 3 * PART  # parts in a ring of two
    logits = (10 * rng.standard_normal((3, width))).astype(np.float32)
    logits[1, : width // 2] -= 1000  # whose exponentials are zero beside the others'
    targets, weights = np.array([0, width - 1, 700], np.int32), np.array([1, 0.3, 0], np.float32)
    gradient, lse = function(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    expected, expected_lse = in_float64(logits, targets, weights)
    assert gradient.dtype == jnp.bfloat16
    assert np.all(np.abs(np.asarray(gradient, np.float64) - expected) <= 2.0**-7 * np.abs(expected) + 1e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


def test_what_is_not_finite_stays_so():
    logits = np.zeros((2, PART), np.float32)
    logits[0, 5], logits[1, 7] = np.nan, np.inf
    for function in (pk.cross_entropy_gradient, INTERPRETED):
        _, lse = function(jnp.asarray(logits), jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.float32))
        assert not np.isfinite(lse).any()


def test_log_sum_exp_in_one_pass():
    """The form of it that a GPU runs."""
    x = 20 * np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)
    x[1, 3], x[2], x[3, 5] = -np.inf, -1e30, np.nan
    expected = np.log(np.sum(np.exp(x - x.max(-1, keepdims=True), dtype=np.float64), -1)) + x.max(-1)
    np.testing.assert_allclose(jax.jit(reference.log_sum_exp_in_one_pass)(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "width, dtype, is_kernel", [(3 * PART, "bfloat16", True), (3 * PART, "float32", False), (129280, "bfloat16", False)]
)
def test_what_the_kernel_does_not_take_is_plain_jax_and_refused_by_name(width, dtype, is_kernel):
    operands = [jax.ShapeDtypeStruct((3, *shape), kind) for shape, kind in (((width,), jnp.float32), ((), jnp.int32), ((), jnp.float32))]
    lowered = lambda **options: jax.jit(functools.partial(pk.cross_entropy_gradient, dtype=dtype, **options)).trace(*operands)  # noqa: E731
    assert ("mosaic_gpu" in lowered().lower(lowering_platforms=("cuda",)).as_text()) == is_kernel
    if not is_kernel:
        with pytest.raises(ValueError, match=r"logits: expected for a bfloat16 gradient, W of a multiple of 4096"):
            lowered(implementation="hopper")


@pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")
def test_compiles():
    specs = [jax.ShapeDtypeStruct(*spec) for spec in (((64, 32768), jnp.float32), ((64,), jnp.int32), ((64,), jnp.float32))]
    with aot.kernels_compiled() as kernels:
        jax.jit(pk.cross_entropy_gradient).lower(*aot.on_h200(specs)).compile()
    assert [kernel.spilled_bytes for kernel in kernels] == [0]


@pytest.mark.parametrize(
    "logits, targets, weights, message",
    [
        (jnp.zeros((3, 8), jnp.bfloat16), jnp.zeros(3, jnp.int32), jnp.zeros(3), r"logits: expected float32 \[T, W\]"),
        (jnp.zeros((3, 8)), jnp.zeros(4, jnp.int32), jnp.zeros(3), r"targets: expected int32 \[3\]"),
        (jnp.zeros((3, 8)), jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32), r"weights: expected float32 \[3\]"),
    ],
)
def test_bad_input(logits, targets, weights, message):
    with pytest.raises(ValueError, match=message):
        pk.cross_entropy_gradient(logits, targets, weights)
