"""scatter_rows against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as pk
from pallas_kernels import aot
from pallas_kernels.scatter_rows import hopper


def interpreted(sources, places, filled, **options):
    return hopper.scatter_rows(places, filled, *sources, interpret=plgpu.InterpretGPUParams(), **options)


def on_gpu(*args, **options):
    return pk.scatter_rows(*args, implementation="hopper", **options)


@pytest.mark.parametrize("scatter", [pk.scatter_rows, interpreted, pytest.param(on_gpu, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("filled", [37, 60])
def test_rows_are_where_numpy_puts_them(monkeypatch, scatter, filled):
    """Two sources, rows with no, one and several places, places beyond the end, zeros behind what is filled."""
    monkeypatch.setattr(hopper, "MOST_PLACES", 12)
    monkeypatch.setattr(hopper, "ZERO_CTAS", 2)
    rng, rows = np.random.default_rng(0), 60
    sources = [rng.integers(0, 256, shape, np.uint8) for shape in ((17, 384), (13, 256))]
    places = np.full(90, rows, np.int32)
    places[:filled] = np.arange(filled)
    places = rng.permutation(places).reshape(30, 3)
    expected, x = np.zeros((rows, 256), np.uint8), np.concatenate([source[:, :256] for source in sources])
    for row, to in zip(x, places):
        expected[to[to < rows]] = row
    found = scatter([jnp.asarray(s) for s in sources], jnp.asarray(places), jnp.asarray(filled, jnp.int32), rows=rows, columns=256)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")
@pytest.mark.parametrize("dtype, width, copies", [(jnp.uint8, 7168, 8), (jnp.uint16, 1024, 3)])
def test_compiles(dtype, width, copies):
    shapes = [jax.ShapeDtypeStruct((4096, width), dtype), jax.ShapeDtypeStruct((4096, width + 128), dtype)]
    specs = shapes, jax.ShapeDtypeStruct((8192, copies), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with aot.kernels_compiled() as kernels:
        run = jax.jit(lambda *args: pk.scatter_rows(*args, rows=16384, columns=width))
        memory = run.lower(*aot.on_h200(specs)).compile().memory_analysis()
    assert [kernel.spilled_bytes for kernel in kernels] == [0] and memory.temp_size_in_bytes < 2**20  # nothing but the rows


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sources": [jnp.zeros((3, 4))]}, "sources: expected matrices of at least 8 columns"),
        ({"places": jnp.zeros((2, 1), jnp.int32)}, r"places: expected int32 \[3, M\]"),
        ({"filled": jnp.zeros(1, jnp.int32)}, "filled: expected int32"),
    ],
)
def test_bad_input(change, message):
    good = {"sources": [jnp.zeros((3, 8))], "places": jnp.zeros((3, 1), jnp.int32), "filled": jnp.zeros((), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        pk.scatter_rows(**(good | change), rows=4, columns=8)
