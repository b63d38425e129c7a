"""gather_rows against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as pk
from pallas_kernels import aot
from pallas_kernels.gather_rows import hopper, shapes


def interpreted(x, index, columns=None):
    parts = x if isinstance(x, tuple) else (x,)
    return hopper.gather_rows(index, *parts, columns=columns, interpret=plgpu.InterpretGPUParams())


ON_GPU = functools.partial(pk.gather_rows, implementation="hopper")


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "gather", [pk.gather_rows, interpreted, pytest.param(ON_GPU, marks=pytest.mark.gpu)], ids=["reference", "hopper", "gpu"]
)
def test_rows_are_those_of_numpy(monkeypatch, gather, dtype):
    monkeypatch.setattr(hopper, "MOST_ROWS", 8)
    rng = np.random.default_rng(0)
    x, index = jnp.asarray(rng.standard_normal((20, 200)), dtype), rng.integers(0, 20, 45).astype(np.int32)
    np.testing.assert_array_equal(np.asarray(gather(x, jnp.asarray(index))), np.asarray(x)[index])


@pytest.mark.parametrize(
    "gather", [pk.gather_rows, interpreted, pytest.param(ON_GPU, marks=pytest.mark.gpu)], ids=["reference", "hopper", "gpu"]
)
def test_matrices_side_by_side_and_apart_again(monkeypatch, gather):
    monkeypatch.setattr(hopper, "MOST_ROWS", 8)
    rng = np.random.default_rng(0)
    parts, index = [rng.integers(0, 256, (20, width), np.uint8) for width in (256, 72)], rng.integers(0, 20, 45).astype(np.int32)
    joined = gather(tuple(map(jnp.asarray, parts)), jnp.asarray(index))
    expected = np.concatenate([parts[0], np.pad(parts[1], ((0, 0), (0, 56)))], axis=1)[index]
    np.testing.assert_array_equal(np.asarray(joined), expected)
    again = index[::-1].copy() % 45
    np.testing.assert_array_equal(np.asarray(gather(joined, jnp.asarray(again), columns=250)), expected[again][:, :250])


@pytest.mark.parametrize("gather", [pk.gather_rows, pytest.param(ON_GPU, marks=pytest.mark.gpu)], ids=["reference", "gpu"])
def test_the_row_past_the_end_is_zero(gather):
    got = gather(jnp.ones((3, 256), jnp.bfloat16), jnp.asarray([2, 3, 0], jnp.int32))
    np.testing.assert_array_equal(np.asarray(got, np.float32)[:, 0], [1, 0, 1])


@pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")
@pytest.mark.parametrize("tokens, rows, width", shapes.ROWS)
def test_compiles(tokens, rows, width):
    specs = jax.ShapeDtypeStruct((tokens, width), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((rows,), jnp.int32)
    with aot.kernels_compiled() as kernels:
        memory = jax.jit(pk.gather_rows).lower(*aot.on_h200(specs)).compile().memory_analysis()
    assert [kernel.spilled_bytes for kernel in kernels] == [0] and memory.temp_size_in_bytes < 2**20  # nothing but the rows


@pytest.mark.parametrize(
    "x, index, message",
    [
        (jnp.zeros((3, 4, 5)), jnp.zeros(2, jnp.int32), "x: expected"),
        (jnp.zeros((3, 4)), jnp.zeros(2), "index: expected int32"),
        (jnp.zeros((3, 4)), jnp.zeros((2, 2), jnp.int32), "index: expected int32"),
        ((jnp.zeros((3, 4)), jnp.zeros((2, 4))), jnp.zeros(2, jnp.int32), r"x: expected float32 \[3, D\]"),
    ],
)
def test_bad_input(x, index, message):
    with pytest.raises(ValueError, match=message):
        pk.gather_rows(x, index)
