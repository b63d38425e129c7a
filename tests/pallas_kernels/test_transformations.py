"""The ops under JAX's transformations: jit, vmap, shard_map, checkpoint, export; and which of them refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import pallas_kernels as pk


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(x, w, sizes):
    """Every op once: values that depend on all of them."""
    a, b = pk.quantize_tiles(x), pk.quantize_blocks(w)
    y = pk.grouped_fp8_matmul(a, b, sizes, out_dtype=jnp.float32)
    dw = pk.grouped_fp8_wgrad(pk.requantize_transposed(pk.quantize_tiles(y), sizes), pk.requantize_transposed(a, sizes), sizes)
    dense = pk.fp8_matmul(pk.rmsnorm_quantize(x, jnp.ones(x.shape[1])), pk.quantize_blocks(w[0]), out_dtype=jnp.float32)
    masked = pk.masked_fp8_matmul(
        pk.quantize_tiles(x.reshape(w.shape[0], -1, x.shape[1])), b, jnp.full_like(sizes, x.shape[0] // w.shape[0])
    )
    x16 = x.astype(jnp.bfloat16)
    y16 = pk.grouped_bf16_matmul(x16, w.astype(jnp.bfloat16), sizes)
    return y, dw, dense, masked.astype(jnp.float32), y16.astype(jnp.float32), pk.grouped_bf16_wgrad(y16, x16, sizes)


X, W, SIZES = normal(32, 256), normal(2, 64, 256, seed=1), np.array([20, 12], np.int32)


@functools.cache
def expected():
    """Without any transformation, op by op."""
    return layer(*map(jnp.asarray, (X, W, SIZES)))


def same(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * float(np.max(np.abs(w)))), got, want)


def test_jit():
    same(jax.jit(layer)(X, W, SIZES), expected())


def test_dense_under_vmap():
    a, b = jax.vmap(pk.quantize_tiles)(normal(3, 16, 256)), jax.vmap(pk.quantize_blocks)(normal(3, 64, 256, seed=1))
    got = jax.vmap(pk.fp8_matmul)(a, b)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], (a, b))
        np.testing.assert_array_equal(got[i], pk.fp8_matmul(*one))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("expert")
    mapped = jax.shard_map(layer, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=check_vma)
    same(jax.jit(mapped)(X, W, SIZES), expected())


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_lowers_for_cuda(check_vma):
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("expert")
    mapped = jax.shard_map(layer, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=check_vma)
    text = jax.jit(mapped).trace(X, W, SIZES).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") >= 6


def test_checkpoint():
    """A layer whose forward pass is FP8 and whose backward pass is given, recomputed under jax.checkpoint."""

    @jax.custom_vjp
    def linear(x, w):
        return pk.fp8_matmul(pk.quantize_tiles(x), pk.quantize_blocks(w), out_dtype=jnp.float32)

    linear.defvjp(lambda x, w: (linear(x, w), (x, w)), lambda saved, dy: (dy @ saved[1], dy.T @ saved[0]))

    def loss(w):
        return jnp.sum(jnp.square(linear(X, w)))

    same(jax.grad(jax.checkpoint(loss))(W[0]), jax.grad(loss)(W[0]))


def test_export_for_hopper():
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(layer), platforms=["cuda"], disabled_checks=checks)(X, W, SIZES)
    assert exported.platforms == ("cuda",) and exported.mlir_module().count("mosaic_gpu_v2") >= 6


def test_export_for_cpu():
    same(jax.export.export(jax.jit(layer), platforms=["cpu"])(X, W, SIZES).call(X, W, SIZES), expected())


def test_differentiation_is_refused():
    """The ops have no derivative of their own: whoever trains with them says what the backward pass quantises."""
    a, b = pk.quantize_tiles(X), pk.quantize_blocks(W[0])
    with pytest.raises(Exception, match=r"[Dd]ifferentiation|grad requires|float0|real-valued"):
        jax.grad(lambda values: jnp.sum(pk.fp8_matmul(pk.Quantized(values, a.stored_scales, "tiles"), b, implementation="hopper")))(
            a.values
        )
