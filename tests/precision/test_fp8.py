"""The FP8 linears against float64, and their taps, overflow counts and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.precision import (
    FP8_REFERENCE,
    FP8Weight,
    Scales,
    Tap,
    check_devices,
    grouped_linear,
    linear,
    quantise,
    recipe,
    swiglu_linear,
    weight_gradient,
)
from pallas_kernels import quantize_blocks
from tests import draw

# e4m3 has 3 mantissa bits: rounding to the nearest moves a value by at most 2^-4 of itself, 2.6% in the mean square. The errors of a
# product's two operands are independent and sums of many terms keep their ratio, so that n roundings give at most sqrt(n) · 2^-4 of the
# product's norm. Inputs of Wgrad are rounded twice (128 channels, then 128 tokens), output gradients once.
STEP = 2.0**-4
BOUND = {"y": np.sqrt(2) * STEP, "dx": np.sqrt(2) * STEP, "dw": np.sqrt(3) * STEP}
POW2 = Scales(input=True, gradient=True)


def f64(x):
    return np.asarray(x).astype(np.float64)


def error(ours, exact):
    return np.linalg.norm(f64(ours) - exact) / np.linalg.norm(exact)


def normal(seed, *shape, dtype=jnp.bfloat16):
    return draw.normal(seed, *shape).astype(dtype)


def passes(function, operands, dy):
    """(function(*operands), the vector dy times its derivative), in one program."""

    @jax.jit
    def run(operands, dy):
        y, vjp = jax.vjp(function, *operands)
        return y, vjp(dy)

    return run(operands, dy)


def within(name, ours, exact):
    """Inside the bound, and not by having skipped the quantisation."""
    assert 0.3 * BOUND[name] < error(ours, exact) < BOUND[name], (name, error(ours, exact))


@pytest.mark.parametrize("scales", [Scales(), POW2])
@pytest.mark.parametrize("t, n, k", [(256, 256, 384), (72, 200, 136)])  # the second: no width is a multiple of 128
def test_linear_and_its_gradients_against_float64(t, n, k, scales):
    x, w, dy = normal(0, t, k), normal(1, n, k, dtype=jnp.float32), normal(2, t, n)
    y, (dx, dw) = passes(lambda x, w: linear(x, w, recipe=FP8_REFERENCE, scales=scales), (x, w), dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    within("y", y, f64(x) @ f64(w).T)
    within("dx", dx, f64(dy) @ f64(w))
    within("dw", dw, f64(dy).T @ f64(x))


def test_gradients_of_a_mean_over_many_tokens_are_not_lost():
    """A loss averaged over 2^30 tokens gives the same gradients, times 2^-30, bit for bit."""
    x, w, dy = normal(0, 64, 256), normal(1, 128, 256, dtype=jnp.float32), normal(2, 64, 128)
    vjp = jax.jit(lambda dy: jax.vjp(lambda x, w: linear(x, w, recipe=FP8_REFERENCE), x, w)[1](dy))
    for large, small in zip(vjp(dy), vjp(dy * jnp.bfloat16(2.0**-30))):
        np.testing.assert_array_equal(f64(large), f64(small) * 2.0**30)


@pytest.mark.parametrize("f, k, sizes", [(128, 256, [100, 0, 60]), (72, 136, [40, 21, 3])])
def test_gate_and_up_of_experts_against_float64(f, k, sizes):
    rows, experts = sum(sizes) + 8, len(sizes)  # rows past the last group give zeros, and get no gradient
    x, w, dy = normal(0, rows, k), normal(1, experts, 2, f, k, dtype=jnp.float32), normal(2, rows, 2 * f)

    @jax.jit  # outside of it sizes must add up
    def run(groups, x, w, dy):
        return passes(lambda x, w: grouped_linear(x, w, groups, recipe=FP8_REFERENCE), (x, w), dy)

    y, (dx, dw) = run(np.array(sizes, np.int32), x, w, dy)
    ends = np.cumsum(sizes)
    expected = {"y": np.zeros((rows, 2 * f)), "dx": np.zeros((rows, k)), "dw": np.zeros((experts, 2, f, k))}
    for e, (start, end) in enumerate(zip(ends - sizes, ends)):
        merged = f64(w[e]).reshape(2 * f, k)
        expected["y"][start:end] = f64(x[start:end]) @ merged.T
        expected["dx"][start:end] = f64(dy[start:end]) @ merged
        expected["dw"][e] = (f64(dy[start:end]).T @ f64(x[start:end])).reshape(2, f, k)
    for name, ours in (("y", y), ("dx", dx), ("dw", dw)):
        within(name, ours, expected[name])
    assert not np.any(f64(y[ends[-1] :])) and not np.any(f64(dx[ends[-1] :]))


@pytest.mark.parametrize("grouped", [False, True])
def test_swiglu_linear_against_float64(grouped):
    t, f, n = 192, 200, 160
    gate_up, dy, weights = normal(0, t, 2 * f), normal(2, t, n), np.random.default_rng(3).uniform(0.1, 1, t).astype(np.float32)
    w = normal(1, *([2] if grouped else []), n, f, dtype=jnp.float32)
    sizes = np.array([120, 72], np.int32) if grouped else None
    y, gradients = passes(lambda *a: swiglu_linear(a[0], a[1], sizes, a[2], recipe=FP8_REFERENCE), (gate_up, w, weights), dy)
    ours = dict(zip(("gate_up", "w", "weights"), gradients), y=y)

    def exact(gate_up, w, weights):
        gate, up = jnp.split(gate_up, 2, axis=-1)
        hidden = jax.nn.silu(gate) * up * weights[:, None]
        return jnp.concatenate([hidden[:120] @ w[0].T, hidden[120:] @ w[1].T]) if grouped else hidden @ w.T

    with jax.enable_x64(True):
        y, gradients = passes(exact, tuple(f64(a) for a in (gate_up, w, weights)), f64(dy))
        exact_values = dict(zip(("gate_up", "w", "weights"), gradients), y=y)
    # The backward pass starts from gate_up rounded to e4m3: one more rounding than a linear has for each of gate and up.
    bounds = {"y": np.sqrt(2), "w": np.sqrt(4), "gate_up": np.sqrt(4), "weights": np.sqrt(5)}
    for name, rounded in bounds.items():
        assert 0.3 * STEP < error(ours[name], f64(exact_values[name])) < rounded * STEP, (name, error(ours[name], f64(exact_values[name])))


@pytest.mark.parametrize("grouped", [False, True])
def test_taps_give_the_same_weight_gradient_bit_for_bit(grouped):
    t, f, k = 96, 72, 136
    x, dy = normal(0, t, k), normal(2, t, 2 * f)
    w = normal(1, *([3] if grouped else []), 2, f, k, dtype=jnp.float32)
    sizes = jnp.array([40, 0, 56]) if grouped else None
    tap = Tap.zeros(t, w.shape, FP8_REFERENCE, grouped=grouped)

    def product(x, w, tap):
        options = {"recipe": FP8_REFERENCE, "scales": POW2}
        return grouped_linear(x, w, sizes, tap, **options) if grouped else linear(x, w, tap, **options)

    @jax.jit
    def both(x, w, tap, dy):
        whole = jax.vjp(lambda x, w: product(x, w, None), x, w)[1](dy)
        split = jax.vjp(product, x, w, tap)[1](dy)
        return whole, split, weight_gradient(split[2], w.shape, sizes, FP8_REFERENCE)

    (dx, dw), (tapped_dx, tapped_dw, stash), deferred = both(x, w, tap, dy)
    assert {stash.x.values.dtype, stash.dy.values.dtype} == {jnp.dtype(jnp.float8_e4m3fn)}
    np.testing.assert_array_equal(f64(dx), f64(tapped_dx))
    assert not np.any(tapped_dw) and np.any(dw)
    np.testing.assert_array_equal(dw, deferred)


def test_a_weight_quantised_beforehand_gives_the_same_bits():
    x, w, dy = normal(0, 64, 136), normal(1, 2, 72, 136, dtype=jnp.float32), normal(2, 64, 144)
    at_hand = FP8Weight.of(quantize_blocks(w), parts=2)
    at_once = passes(lambda x, w: linear(x, w, recipe=FP8_REFERENCE), (x, w), dy)
    before = passes(lambda x, w: linear(x, at_hand._replace(master=w), recipe=FP8_REFERENCE), (x, w), dy)
    for ours, expected in zip(jax.tree.leaves(before), jax.tree.leaves(at_once)):
        np.testing.assert_array_equal(f64(ours), f64(expected))


def test_rows_quantised_beforehand_pass_their_gradient_through():
    x, w, sizes = normal(0, 48, 256), normal(1, 2, 64, 256, dtype=jnp.float32), jnp.array([30, 18])

    def loss(x, enter):
        return jnp.sum(grouped_linear(enter(x), w, sizes, recipe=FP8_REFERENCE, scales=POW2).astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    late, early = gradient(x, lambda x: x), gradient(x, lambda x: quantise(x, FP8_REFERENCE, True))
    assert np.any(f64(late))
    np.testing.assert_array_equal(f64(late), f64(early))


def test_overflow_is_counted_in_input_and_gradient():
    x, w, dy = normal(0, 16, 384), normal(1, 128, 384, dtype=jnp.float32), normal(2, 16, 128)
    x[3, 5], x[3, 7], x[4, 300] = np.nan, np.inf, -np.inf  # in two tiles
    x[9] = np.nan  # three
    dy[0, 0] = np.inf
    _, (count,) = passes(lambda count: linear(x, w, recipe=FP8_REFERENCE, overflow=count), (np.zeros(2, np.float32),), dy)
    np.testing.assert_array_equal(count, [5, 1])


def test_the_hopper_recipe_refuses_other_devices_by_name():
    with pytest.raises(UserError, match=r"Hopper GPU.*sm_90.*fp8_reference"):
        check_devices(recipe("fp8"), jax.devices("cpu"))
    check_devices(recipe("fp8_reference"), jax.devices("cpu"))
    with pytest.raises(ValueError, match="Hopper GPU"):  # and nothing falls back if nobody asked
        jax.jit(lambda x, w: linear(x, w, recipe=recipe("fp8")))(normal(0, 8, 128), normal(1, 128, 128))
