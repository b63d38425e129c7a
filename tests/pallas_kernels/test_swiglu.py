"""swiglu_gradient against float64 by autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as pk
from pallas_kernels import aot
from pallas_kernels.swiglu import hopper

INTERPRETED = functools.partial(hopper.swiglu_gradient, interpret=plgpu.InterpretGPUParams())
ON_GPU = functools.partial(pk.swiglu_gradient, implementation="hopper")
EVERY = pytest.mark.parametrize(
    "gradient", [pk.swiglu_gradient, INTERPRETED, pytest.param(ON_GPU, marks=pytest.mark.gpu)], ids=["reference", "hopper", "gpu"]
)


def in_float64(gate_up, d_hidden, row_weights):
    with jax.enable_x64(True):
        gate_up, d_hidden, row_weights = (jnp.asarray(np.asarray(x, np.float64)) for x in (gate_up, d_hidden, row_weights))

        def hidden(gate_up, row_weights):
            gate, up = jnp.split(gate_up, 2, axis=-1)
            return gate / (1 + jnp.exp(-gate)) * up * row_weights[:, None]

        return tuple(map(np.asarray, jax.vjp(hidden, gate_up, row_weights)[1](d_hidden)))


@pytest.mark.parametrize("weighted", [True, False])
@EVERY
def test_gradients(gradient, weighted):
    rng, rows, width = np.random.default_rng(0), 140, 64  # the last tile is not full
    gate_up, d_hidden = (jnp.asarray(rng.standard_normal((rows, n)), jnp.bfloat16) for n in (2 * width, width))
    row_weights = jnp.asarray(rng.random(rows) if weighted else np.ones(rows), jnp.float32)
    d_gate_up, d_row_weights = gradient(gate_up, d_hidden, row_weights if weighted else None)
    expected, expected_weights = in_float64(gate_up, d_hidden, row_weights)
    assert d_gate_up.dtype == jnp.bfloat16
    assert np.all(np.abs(np.asarray(d_gate_up, np.float64) - expected) <= 2.0**-8 * np.abs(expected) + 1e-5)
    if weighted:
        np.testing.assert_allclose(d_row_weights, expected_weights, atol=1e-5 * np.abs(expected_weights).max())
    else:
        assert d_row_weights is None


@pytest.mark.parametrize("width, dtype, is_kernel", [(64, jnp.bfloat16, True), (72, jnp.bfloat16, False), (64, jnp.float32, False)])
def test_what_the_kernel_does_not_take_is_plain_jax_and_refused_by_name(width, dtype, is_kernel):
    operands = [jax.ShapeDtypeStruct((140, n), dtype) for n in (2 * width, width)]
    lowered = lambda **options: jax.jit(functools.partial(pk.swiglu_gradient, **options)).trace(*operands)  # noqa: E731
    assert ("mosaic_gpu" in lowered().lower(lowering_platforms=("cuda",)).as_text()) == is_kernel
    if not is_kernel:
        with pytest.raises(ValueError, match="gate_up: expected 16 bits, as of d_hidden, and F of a multiple of 64"):
            lowered(implementation="hopper")


@pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")
def test_compiles():
    specs = [jax.ShapeDtypeStruct((5000, n), jnp.bfloat16) for n in (4096, 2048)] + [jax.ShapeDtypeStruct((5000,), jnp.float32)]
    with aot.kernels_compiled() as kernels:
        jax.jit(pk.swiglu_gradient).lower(*aot.on_h200(specs)).compile()
    assert [kernel.spilled_bytes for kernel in kernels] == [0]
    assert kernels[0].registers <= 128  # four CTAs share an SM


@pytest.mark.parametrize(
    "gate_up, d_hidden, row_weights, message",
    [
        (jnp.zeros((3, 8)), jnp.zeros((3, 5)), None, r"gate_up: expected \[3, 10\]"),
        (jnp.zeros((3, 8)), jnp.zeros((3, 4)), jnp.zeros(4), r"row_weights: expected \[3\]"),
        (jnp.zeros((3, 8), jnp.int32), jnp.zeros((3, 4)), None, "gate_up: expected"),
    ],
)
def test_bad_input(gate_up, d_hidden, row_weights, message):
    with pytest.raises(ValueError, match=message):
        pk.swiglu_gradient(gate_up, d_hidden, row_weights)
