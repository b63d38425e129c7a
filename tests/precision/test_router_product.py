"""Float32 products of bfloat16 parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision import BF16, linear
from tests import draw


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_router_of_a_bf16_recipe_is_as_exact_as_float32(dtype):
    """Against float64; the gradient of a bfloat16 input is rounded to bfloat16 once."""
    x, w, dy = draw.normal(0, 300, 512).astype(dtype), draw.normal(1, 24, 512), draw.normal(2, 300, 24)
    assert BF16.router.in_parts

    @jax.jit
    def passes(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: linear(x, w, recipe=BF16.router), x, w)
        return y, *vjp(dy)

    y, dx, dw = passes(x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, jnp.float32)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    for ours, exact, bound in ((y, x @ w.T, 3e-7), (dx, dy @ w, 2e-3 if dtype == jnp.bfloat16 else 3e-7), (dw, dy.T @ x, 3e-7)):
        assert np.linalg.norm(np.asarray(ours, np.float64) - exact) < bound * np.linalg.norm(exact)


def test_a_bfloat16_weight_is_one_part():
    """The router of a released checkpoint: as exact as its copy in float32, which is cut into three parts, by one product."""
    x, w = draw.normal(0, 30, 512).astype(jnp.bfloat16), draw.normal(1, 24, 512).astype(jnp.bfloat16)
    product = lambda x, w: linear(x, w, recipe=BF16.router)  # noqa: E731
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    for weight, products in ((w, 1), (w.astype(np.float32), 3)):
        y = jax.jit(product)(x, weight)
        assert y.dtype == jnp.float32 and np.linalg.norm(np.asarray(y, np.float64) - exact) < 3e-7 * np.linalg.norm(exact)
        assert str(jax.make_jaxpr(product)(x, weight)).count("dot_general[") == products
