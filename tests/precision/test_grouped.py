"""Unquantised grouped products on a CPU against float64, and what a GPU gets."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision import BF16, FLOAT32, grouped, grouped_linear
from pallas_kernels import aot
from tests import draw

SIZES = [100, 0, 43]  # of 150 rows: the last seven belong to no group
ROWS, EXPERTS, N, K = 150, 3, 72, 136


def operands(dtype):
    x, w, dy = (draw.normal(seed, *shape).astype(dtype) for seed, shape in enumerate(((ROWS, K), (EXPERTS, N, K), (ROWS, N))))
    return x, w, dy, np.array(SIZES, np.int32)


def f64(x):
    return np.asarray(x).astype(np.float64)


def exact(x, w, dy):
    y, dx, dw = np.zeros((ROWS, N)), np.zeros((ROWS, K)), np.zeros((EXPERTS, N, K))
    for e, end in enumerate(np.cumsum(SIZES)):
        rows = slice(end - SIZES[e], end)
        y[rows], dx[rows], dw[e] = f64(x[rows]) @ f64(w[e]).T, f64(dy[rows]) @ f64(w[e]), f64(dy[rows]).T @ f64(x[rows])
    return y, dx, dw


def near(ours, expected, bound):
    assert ours.shape == expected.shape
    assert np.linalg.norm(f64(ours) - expected) < bound * np.linalg.norm(expected)


@pytest.mark.parametrize("recipe, bound", [(FLOAT32, 1e-6), (BF16, 2.0**-8)])
def test_plain_products(recipe, bound):
    x, w, dy, sizes = operands(recipe.compute_dtype)
    y, dx, dw = exact(x, w, dy)
    matmul = jax.jit(grouped.grouped_matmul, static_argnums=3, static_argnames="transposed")
    near(matmul(x, w, sizes, recipe), y, bound)
    near(matmul(dy, w, sizes, recipe, transposed=False), dx, bound)
    near(jax.jit(grouped.grouped_matmul_weight_gradient, static_argnums=3)(x, dy, sizes, recipe), dw, 1e-6)


@functools.partial(jax.jit, static_argnums=0)
def step(recipe, x, w, dy, sizes):
    y, vjp = jax.vjp(lambda x, w: grouped_linear(x, w, sizes, recipe=recipe), x, w)
    return y, *vjp(dy)


def specs(f=256):
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    return shape(512, 384), shape(4, 2, f, 384, dtype=jnp.float32), shape(512, 2 * f), shape(4, dtype=jnp.int32)


@pytest.mark.parametrize("num_sms", [132, 112])
def test_a_gpu_gets_the_kernels_with_the_sms_it_is_given(num_sms):
    text = step.trace(dataclasses.replace(BF16, num_sms=num_sms), *specs()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3
    jaxpr = str(jax.make_jaxpr(step, static_argnums=0)(dataclasses.replace(BF16, num_sms=num_sms), *specs()))
    grids, clusters = (re.findall(rf"\b{name}=\((\d+),\)", jaxpr) for name in ("grid", "cluster"))
    assert [int(grid) * int(cluster) for grid, cluster in zip(grids, clusters, strict=True)] == [num_sms] * 3


@pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")
def test_the_kernels_compile_to_machine_code_without_spills():
    with aot.kernels_compiled() as kernels:
        step.lower(BF16, *aot.on_h200(specs())).compile()
    assert len(kernels) == 3 and all(kernel.spilled_bytes == 0 and not kernel.serialized for kernel in kernels)


@pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")
def test_xla_leaves_kernels_out_of_its_dynamic_slice_fusions():
    """It would wait for ever for its own lock, on the device (pallas_kernels/platform.py)."""

    def stack(x, ws, sizes):
        def layer(x, w):
            y = grouped_linear(x, w, sizes, recipe=BF16)
            return y, y

        y, vjp = jax.vjp(lambda x, ws: jax.lax.scan(layer, x, ws), x, ws)
        return vjp(y)

    x, sizes = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    ws = jax.ShapeDtypeStruct((3, 2, 128, 128), jnp.bfloat16)
    computations = jax.jit(stack).lower(*aot.on_h200((x, ws, sizes))).compile().as_text().split("\n}\n")
    holders = [text.strip().split(" ")[0] for text in computations for _ in range(text.count('custom_call_target="mosaic_gpu_v2"'))]
    assert len(holders) == 3 and not any("slice" in name for name in holders), holders
