"""Attention against float64, and the private JAX interface under it: lowered for a GPU, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.fused_attention import causal_attention, merge, partial_attention
from tests import draw

SCALE = 0.2
WIDTHS = (24, 16)  # of keys and of values, which are narrower, as in MLA


def operands(length, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [draw.normal(rng, 2, length, 3, width).astype(dtype) for width in (WIDTHS[0], WIDTHS[0], WIDTHS[1], WIDTHS[1])]


def exact(q, k, v, seen_BST):
    """In float64 by numpy, pair by pair of what is seen."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    scores = np.where(seen_BST[:, None], np.einsum("bshd,bthd->bhst", q, k) * SCALE, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhst,bthv->bshv", weights / weights.sum(-1, keepdims=True), v)


def causal(length, segments=None):
    seen = np.tril(np.ones((2, length, length), bool))
    return seen if segments is None else seen & (segments[:, :, None] == segments[:, None, :])


SEGMENTS = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 6, 6]])


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-7)])
def test_output_and_gradients(dtype, bound, segments):
    q, k, v, d_out = operands(10, dtype=dtype)
    masks = None if segments is None else jnp.asarray(segments)

    @jax.jit
    def passes(q, k, v, d_out):
        out, vjp = jax.vjp(lambda *qkv: causal_attention(*qkv, SCALE, masks), q, k, v)
        return out, vjp(d_out)

    ours, gradients = jax.device_get(passes(q, k, v, d_out))
    seen = causal(10, segments)
    assert np.abs(ours - exact(q, k, v, seen)).max() < bound * np.abs(ours).max() * 2

    def plain(q, k, v):
        scores = jnp.where(seen[:, None], jnp.einsum("bshd,bthd->bhst", q, k) * SCALE, -jnp.inf)
        return jnp.einsum("bhst,bthv->bshv", jax.nn.softmax(scores, axis=-1), v)

    with jax.enable_x64(True):
        wide = [x.astype(np.float64) for x in (q, k, v, d_out)]
        expected = jax.jit(lambda *qkv_d: jax.vjp(plain, *qkv_d[:3])[1](qkv_d[3]))(*wide)
    for gradient, reference in zip(gradients, expected):
        assert gradient.dtype == dtype
        assert np.linalg.norm(np.asarray(gradient, np.float64) - reference) < 2 * bound * np.linalg.norm(reference)


def after_prefix(q, k, v, before_k, before_v, prefix_lengths):
    """A chunk over what comes before it and over itself, merged."""
    size = q.shape[1]
    seen = jnp.arange(before_k.shape[1]) < prefix_lengths[:, None, None]
    before = partial_attention(q, before_k, before_v, jnp.broadcast_to(seen, (len(q), size, before_k.shape[1])), SCALE)
    within = partial_attention(q, k, v, jnp.broadcast_to(jnp.tril(jnp.ones((size, size), bool)), (len(q), size, size)), SCALE)
    return merge(before, within)[0].astype(v.dtype)


@pytest.mark.parametrize("prefix_lengths", [[7, 3], [0, 7]])
def test_a_chunk_after_a_prefix_is_the_end_of_the_whole_row(prefix_lengths):
    q, k, v, _ = operands(12)
    before_k, before_v = operands(7, seed=1)[1:3]
    ours = jax.jit(after_prefix)(q, k, v, before_k, before_v, np.array(prefix_lengths))
    for row, length in enumerate(prefix_lengths):
        keys = np.concatenate([before_k[row, :length], k[row]])[None]
        values = np.concatenate([before_v[row, :length], v[row]])[None]
        seen = np.arange(length + 12) <= length + np.arange(12)[:, None]
        np.testing.assert_allclose(ours[row], exact(q[row : row + 1], keys, values, seen[None])[0], atol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_gpu_gets_cudnn_forward_and_backward(masked):
    """Fails when JAX moves or changes the private primitives. Widths are V3's."""
    shape = lambda width: jax.ShapeDtypeStruct((2, 256, 4, width), jnp.bfloat16)  # noqa: E731
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def gradients(q, k, v, segments):
        out = causal_attention(q, k, v, SCALE, segments if masked else None)
        return jax.grad(lambda *args: jnp.sum(causal_attention(*args, SCALE, segments if masked else None)), argnums=(0, 1, 2))(
            q, k, v
        ), out

    lowered = jax.jit(gradients).trace(shape(192), shape(192), shape(128), segments).lower(lowering_platforms=("cuda",)).as_text()
    name = "__cudnn$fmhaScaleBiasSoftmax" if masked else "__cudnn$fmhaSoftmax"
    assert f"@{name}(" in lowered and f"@{name}Backward(" in lowered
    assert "CAUSAL" in lowered and "exponential" not in lowered  # and nothing of the plain path


@pytest.mark.parametrize("flags", ["", "--xla_gpu_deterministic_ops=true"])
def test_a_deterministic_backward_pass_says_so_before_xla_does(flags, monkeypatch):
    """Or the second of two equal ones does not find its plan when it runs."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    shape = lambda width: jax.ShapeDtypeStruct((2, 256, 4, width), jnp.bfloat16)  # noqa: E731
    gradient = jax.grad(lambda q, k, v: jnp.sum(causal_attention(q, k, v, SCALE)))
    lowered = jax.jit(gradient).trace(shape(192), shape(192), shape(128)).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in lowered.splitlines() if "@__cudnn$fmha" in line]
    assert len(calls) == 2
    for call in calls:
        assert ("force_deterministic" in call) == (bool(flags) and "Backward(" in call)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_on_the_gpu_against_float32(masked):
    """V3's widths. Run by hand: pytest -m gpu tests/model/test_fused_attention.py"""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (2, 512, 4, w)).astype(jnp.bfloat16) for key, w in zip(keys, (192, 192, 128, 128)))
    segments = jnp.broadcast_to(jnp.arange(512) // 200, (2, 512)) if masked else None

    def passes(*qkv):
        out, vjp = jax.vjp(lambda *qkv: causal_attention(*qkv, SCALE, segments), *qkv)
        return out, *vjp(d_out.astype(out.dtype))

    for function in (passes, lambda q, k, v: (after_prefix(q, k, v, k[:, :300], v[:, :300], np.array([300, 0])),)):
        ours = jax.jit(function)(q, k, v)
        for x, reference in zip(ours, jax.jit(function)(*(x.astype(jnp.float32) for x in (q, k, v)))):
            assert jnp.linalg.norm(x.astype(jnp.float32) - reference) < 6e-3 * jnp.linalg.norm(reference)
