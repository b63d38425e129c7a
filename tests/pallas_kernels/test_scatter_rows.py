"""scatter_rows against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as pk
from pallas_kernels import aot
from pallas_kernels.scatter_rows import hopper

INTERPRETED = functools.partial(hopper.scatter_rows, interpret=plgpu.InterpretGPUParams())
ON_GPU = functools.partial(pk.scatter_rows, implementation="hopper")


@pytest.mark.parametrize(
    "scatter", [pk.scatter_rows, INTERPRETED, pytest.param(ON_GPU, marks=pytest.mark.gpu)], ids=["reference", "hopper", "gpu"]
)
@pytest.mark.parametrize("filled", [37, 60])
def test_rows_are_where_numpy_puts_them(monkeypatch, scatter, filled):
    """Rows with no, one and several places; zeros behind what is filled."""
    monkeypatch.setattr(hopper, "MOST_PLACES", 12)
    monkeypatch.setattr(hopper, "ZERO_CTAS", 2)
    rng, rows = np.random.default_rng(0), 60
    x, places = rng.integers(0, 256, (30, 384), np.uint8), np.full(90, rows, np.int32)
    places[:filled] = np.arange(filled)
    places = rng.permutation(places).reshape(30, 3)
    expected = np.zeros((rows, 256), np.uint8)
    for row, to in zip(x, places):
        expected[to[to < rows]] = row[:256]
    found = scatter(jnp.asarray(x), jnp.asarray(places), jnp.asarray(filled, jnp.int32), rows=rows, columns=256)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.gpu
def test_many_rows_on_a_gpu():
    """As in training: a multiple of 128 rows, of which 7 of 8 are filled, and the rest zeroed by many thread blocks."""
    rng, tokens, copies, rows = np.random.default_rng(0), 1024, 8, 8192
    filled = rows // 8 * 7
    places = rng.permutation(np.where(np.arange(tokens * copies) < filled, np.arange(tokens * copies), rows)).reshape(tokens, copies)
    x = rng.integers(0, 256, (tokens, 1024), np.uint8)
    expected = np.zeros((rows, 1024), np.uint8)
    for row, to in zip(x, places):
        expected[to[to < rows]] = row
    found = ON_GPU(jnp.asarray(x), jnp.asarray(places, jnp.int32), jnp.asarray(filled, jnp.int32), rows=rows, columns=1024)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")
@pytest.mark.parametrize("dtype, width, copies", [(jnp.uint8, 7168, 8), (jnp.bfloat16, 1024, 3)])
def test_compiles(dtype, width, copies):
    specs = jax.ShapeDtypeStruct((4096, width + 128), dtype), jax.ShapeDtypeStruct((4096, copies), jnp.int32)
    specs = *specs, jax.ShapeDtypeStruct((), jnp.int32)
    with aot.kernels_compiled() as kernels:
        run = jax.jit(functools.partial(pk.scatter_rows, rows=16384, columns=width))
        memory = run.lower(*aot.on_h200(specs)).compile().memory_analysis()
    assert [kernel.spilled_bytes for kernel in kernels] == [0] and memory.temp_size_in_bytes < 2**20  # nothing but the rows


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.zeros((3, 4, 5))}, "x: expected"),
        ({"places": jnp.zeros((2, 1), jnp.int32)}, r"places: expected int32 \[3, M\]"),
        ({"filled": jnp.zeros(1, jnp.int32)}, "filled: expected int32"),
        ({"columns": 9}, "columns: expected 1 to 8"),
    ],
)
def test_bad_input(change, message):
    good = {"x": jnp.zeros((3, 8)), "places": jnp.zeros((3, 1), jnp.int32), "filled": jnp.zeros((), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        pk.scatter_rows(**({"rows": 4} | good | change))
