"""Weights kept in FP8 in the parameter dict: the same model as their dequantised values, through every path that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import Decoder
from dsv3_jax.precision import FP8_WEIGHTS, fp8_axes, from_fp8, linear, to_fp8
from pallas_kernels import Quantized
from tests import draw

# No width of a linear is a multiple of 128, as the scales' edge blocks must be right too.
CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=160,
    num_hidden_layers=2,
    intermediate_size=200,
    num_attention_heads=3,
    q_lora_rank=48,
    kv_lora_rank=136,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    first_k_dense_replace=1,
    moe_intermediate_size=136,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    initializer_range=0.05,
)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(CONFIG)


@pytest.fixture(scope="module")
def stored(decoder):
    return jax.jit(to_fp8)(draw.parameters(decoder))


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))}


def test_every_fp8_weight_has_scales_and_nothing_else_does(decoder, stored):
    found = leaves(stored)
    for path, leaf in leaves(decoder.abstract_params()).items():
        name = path.split("'")[-2]
        scale = path.replace(f"'{name}'", f"'{name}_scale'")
        assert found[path].shape == leaf.shape
        assert (name in FP8_WEIGHTS) == (scale in found) == (found[path].dtype == jnp.float8_e4m3fn), path
        if name in FP8_WEIGHTS:
            assert found[scale].shape == (*leaf.shape[:-2], -(-leaf.shape[-2] // 128), -(-leaf.shape[-1] // 128))
    assert jax.tree.structure(fp8_axes(decoder.logical_axes()), is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.structure(stored)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dequantised_values_are_bit_equal_to_code_times_scale(stored, dtype):
    experts = stored["moe_layers"]["mlp"]["experts"]
    codes, scales = (np.asarray(experts["gate_up_proj" + end]).astype(np.float32) for end in ("", "_scale"))
    expected = np.zeros_like(codes)
    for n in range(codes.shape[-2]):
        for k in range(codes.shape[-1]):
            expected[..., n, k] = codes[..., n, k] * scales[..., n // 128, k // 128]
    ours = jax.jit(from_fp8, static_argnums=1)(stored, dtype)["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
    np.testing.assert_array_equal(np.asarray(ours), expected.astype(dtype))


def test_the_model_computes_with_the_dequantised_values(decoder, stored):
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 12)).astype(np.int32)
    plain = jax.jit(from_fp8)(stored)

    def passes(params):
        output = decoder(params, tokens)
        mtp, _ = decoder.mtp(params, output.hidden_BSD[:, :-1], tokens[:, 1:])
        caches = {name: jnp.zeros((1, 2, 64, CONFIG.latent_dim)) for name in ("dense_layers", "moe_layers")}
        positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
        decoded, *_ = decoder.decode(decoder.decode_params(params), tokens, positions, caches, jnp.array([[0], [1]]), jnp.full((2,), 12))
        return output.hidden_BSD, mtp, decoded

    for ours, expected in zip(jax.jit(passes)(stored), jax.jit(passes)(plain)):
        np.testing.assert_array_equal(ours, expected)


def test_a_weight_kept_in_fp8_is_frozen(stored):
    attention = jax.tree.map(lambda leaf: np.asarray(leaf)[0], stored["dense_layers"]["self_attn"])
    x = draw.normal(2, 5, CONFIG.hidden_size)

    def loss(x, codes, scales):
        return jnp.sum(linear(x, Quantized.blocks(codes, scales)) ** 2)

    codes, scales = attention["kv_a_proj_with_mqa"], attention["kv_a_proj_with_mqa_scale"]
    dx, d_scales = jax.jit(jax.grad(loss, argnums=(0, 2)))(x, codes, scales)
    w = np.asarray(jax.jit(lambda codes, scales: Quantized.blocks(codes, scales).dequantize(jnp.float32))(codes, scales))
    np.testing.assert_allclose(dx, 2 * (x @ w.T) @ w, rtol=1e-4, atol=1e-3)
    assert not np.any(d_scales)
