"""The FP8 recipe on whole models: near the oracle, every loss term as in BF16, and kept for the backward pass what the table allows."""

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.config import ModelConfig
from dsv3_jax.model import Decoder
from dsv3_jax.precision import BF16, FP8, FP8_REFERENCE, FP8_WEIGHTS, Tap, attach, forms, overflow_counters
from dsv3_jax.training.loss import loss_and_terms
from tests import draw

# Every width differs from every other, so that a shape says what an array is.
CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=160,
    num_hidden_layers=1,
    intermediate_size=200,
    num_attention_heads=3,
    q_lora_rank=48,
    kv_lora_rank=152,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    first_k_dense_replace=0,
    moe_intermediate_size=136,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    initializer_range=0.05,
)
# What is compiled has a dense layer and the MTP module, which is a MoE layer: one layer of each kind.
COMPILED = dataclasses.replace(CONFIG, first_k_dense_replace=1)
BATCH, LENGTH = 2, 14
PARAMS = Decoder(CONFIG).abstract_params()
TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
# XLA may otherwise leave out the rounding to bfloat16 between two operations, in one of two programs and not in the other.
EXACT = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}  # and compiles faster


def loss(recipe, params, extras=(), remat="norms_and_up", config=CONFIG):
    decoder = Decoder(config, recipe, remat=remat)
    return loss_and_terms(decoder, attach(params, *extras), {"tokens": TOKENS}, mtp_loss_weight=0.3, balance_loss_weight=1e-2)


def gradients(params, fp8, recipe, remat="norms_and_up", config=CONFIG):
    """(terms, gradients, overflow counts) of a step as training makes it."""
    step = jax.value_and_grad(lambda params, counters: loss(recipe, params, (fp8, counters), remat, config), argnums=(0, 1), has_aux=True)
    (_, terms), (grads, counts) = step(params, overflow_counters(params, recipe))
    return terms, grads, counts


def compiled(recipe, remat="norms_and_up"):
    return jax.jit(functools.partial(gradients, recipe=recipe, remat=remat, config=COMPILED), compiler_options=EXACT)


def without_masters(params):
    """Masters that give NaN wherever they are read: once quantised, nothing in the step may read them again."""

    def blank(path, leaf):
        return np.full_like(leaf, np.nan) if path[-1].key in FP8_WEIGHTS else leaf

    return jax.tree_util.tree_map_with_path(blank, params)


@pytest.fixture(scope="module")
def params():
    return draw.parameters(Decoder(COMPILED))


@pytest.fixture(scope="module")
def fp8(params):
    return jax.jit(lambda params: forms(params, FP8_REFERENCE))(params)


@pytest.fixture(scope="module")
def fp8_step():
    return compiled(FP8_REFERENCE)


@pytest.fixture(scope="module")
def steps(params, fp8, fp8_step):
    return {"bf16": compiled(BF16)(params, {}), "fp8_reference": fp8_step(without_masters(params), fp8)}


def test_every_loss_term_is_as_in_bf16(steps):
    (bf16, _, _), (fp8, _, _) = steps["bf16"], steps["fp8_reference"]
    for term in ("main", "mtp", "balance"):
        assert fp8[term] != bf16[term]
        # e4m3 moves the loss of a token either way: the mean of 28 tokens keeps up to half a percent of that, a real batch far less.
        np.testing.assert_allclose(fp8[term], bf16[term], rtol=1e-2, err_msg=term)
    np.testing.assert_array_equal(fp8["load"].sum(-1), bf16["load"].sum(-1))


def test_every_gradient_goes_where_that_of_bf16_goes_in_float32(steps):
    (_, bf16, _), (_, fp8, counts) = steps["bf16"], steps["fp8_reference"]
    for (path, ours), expected in zip(jax.tree.leaves_with_path(fp8), jax.tree.leaves(bf16)):
        name = jax.tree_util.keystr(path)
        assert ours.dtype == jnp.float32 and np.all(np.isfinite(ours)), name
        if "e_score_correction_bias" in name:
            assert not np.any(ours)
        else:  # the same direction; some tokens go to other experts, so not element by element
            cosine = np.vdot(ours, expected) / (np.linalg.norm(ours) * np.linalg.norm(expected))
            assert cosine > 0.8, (name, cosine)
    assert sum(map(np.sum, jax.tree.leaves(counts))) == 0
    assert len(jax.tree.leaves(counts)) == len([name for name in names(bf16) if name in FP8_WEIGHTS])


def names(tree):
    return [path[-1].key for path, _ in jax.tree.leaves_with_path(tree)]


def test_an_overflow_is_counted_where_it_happened(params, fp8, fp8_step):
    gain = params["mtp"]["layer"]["input_layernorm"].copy()
    gain[3] = np.inf
    mtp = params["mtp"] | {"layer": params["mtp"]["layer"] | {"input_layernorm": gain}}
    _, _, counts = fp8_step(params | {"mtp": mtp}, fp8)
    of_input = jax.tree.map(lambda count: np.asarray(count)[..., 0].sum(), counts)
    attention = of_input["mtp"]["layer"]["self_attn"]
    assert attention["q_a_proj_overflow"] == attention["kv_a_proj_with_mqa_overflow"] == BATCH * LENGTH  # one tile of every token
    assert not any(jax.tree.leaves(of_input["dense_layers"]))  # nothing that was computed before


def test_recomputation_changes_no_bit_but_in_the_router(params, fp8, steps):
    kept = compiled(FP8_REFERENCE, "none")(params, fp8)
    for (path, ours), expected in zip(jax.tree.leaves_with_path(steps["fp8_reference"]), jax.tree.leaves(kept)):
        name = jax.tree_util.keystr(path)
        if "['gate']" in name:  # jax 0.11.2 adds the float32 terms of the router's gradient in another order where it is recomputed
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max(), err_msg=name)
        else:
            np.testing.assert_array_equal(ours, expected, err_msg=name)


def weight_shapes():
    """The last two axes of every FP8 weight, both ways round."""
    found = set()
    for path, leaf in jax.tree.leaves_with_path(PARAMS):
        if path[-1].key in FP8_WEIGHTS:
            n, k = leaf.shape[-2:]
            found |= {(n, k), (k, n)} | ({(2 * n, k), (k, 2 * n)} if path[-1].key == "gate_up_proj" else set())
    return found


# Both are the same but for who computes the products: that of the kernels is what users run.
RECIPES = pytest.mark.parametrize("recipe", [FP8, pytest.param(FP8_REFERENCE, marks=pytest.mark.slow)])


@RECIPES
def test_kept_for_the_backward_pass_is_what_the_table_says(recipe):
    """Of a layer: e4m3 (as uint8), the attention output, the two small latents and the residual stream; nothing else in bf16 or wide."""

    def residuals(params):
        fp8 = jax.lax.stop_gradient(forms(params, recipe))
        return jax.vjp(lambda params: loss(recipe, params, (fp8,))[0], params)[1]

    kept = Counter()
    for leaf in jax.tree.leaves(jax.eval_shape(residuals, PARAMS)):
        if leaf.dtype in (jnp.bfloat16, jnp.uint8) and leaf.shape[:1] == (1,) and leaf.ndim > 2:  # of the stack
            kept[leaf.dtype.name, leaf.shape[1:]] += 1
    c, tokens, rows = CONFIG, (BATCH, LENGTH), BATCH * LENGTH
    assert kept == {
        ("bfloat16", (*tokens, c.hidden_size)): 2,  # the layer's input, and the residual stream after attention
        ("bfloat16", (*tokens, c.q_lora_rank)): 1,
        ("bfloat16", (*tokens, c.latent_dim)): 1,
        ("bfloat16", (*tokens, c.num_attention_heads, c.v_head_dim)): 1,
        ("uint8", (rows * c.num_experts_per_tok, c.hidden_size)): 1,  # dispatched tokens
        ("uint8", (rows * c.num_experts_per_tok, 2 * c.moe_intermediate_size)): 1,  # gate and up of the routed experts
        ("uint8", (rows, 2 * c.moe_intermediate_size)): 1,  # and of the shared one
    }


@RECIPES
def test_no_bf16_copy_of_an_fp8_weight_anywhere_in_the_step(recipe):
    forbidden, seen = weight_shapes(), Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                if getattr(variable.aval, "shape", ())[-2:] in forbidden:
                    seen[variable.aval.dtype] += 1
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(lambda params: gradients(params, forms(params, recipe), recipe))(PARAMS).jaxpr)
    assert seen[jnp.dtype(jnp.float8_e4m3fn)] and seen[jnp.dtype(jnp.float32)]  # the walk finds weights
    assert not seen[jnp.dtype(jnp.bfloat16)]


@pytest.mark.slow
def test_scales_are_powers_of_two_where_the_report_has_them():
    """Of a layer's weight gradients: the inputs of o_proj and of gate_up_proj, the output gradients of down_proj (§3.3.2, §3.3.3)."""
    decoder = Decoder(CONFIG, FP8_REFERENCE, remat="none")
    layer = jax.tree.map(lambda leaf: leaf[0], draw.parameters(decoder)["moe_layers"])
    taps, rows = {}, BATCH * LENGTH
    for path, w in jax.tree.leaves_with_path(layer):
        *keys, name = (key.key for key in path)
        if name in FP8_WEIGHTS:
            inner, grouped = functools.reduce(lambda tree, key: tree.setdefault(key, {}), keys, taps), "experts" in keys
            inner[name + "_tap"] = Tap.zeros(rows * (CONFIG.num_experts_per_tok if grouped else 1), w.shape, FP8_REFERENCE, grouped=grouped)
    x_BSD, where = draw.normal(5, BATCH, LENGTH, CONFIG.hidden_size).astype(jnp.bfloat16), decoder.positions(TOKENS[:, 1:])

    def total(taps):
        return jnp.sum(decoder.layer("moe_layers", attach(layer, taps), x_BSD, where)[0].astype(jnp.float32) ** 2)

    found = {"x": set(), "dy": set()}
    for path, tap in jax.tree.leaves_with_path(
        jax.jit(jax.grad(total), compiler_options=EXACT)(taps), is_leaf=lambda leaf: isinstance(leaf, Tap)
    ):
        for operand in found:
            mantissas, _ = np.frexp(getattr(tap, operand).scales())
            if np.all(mantissas == 0.5):
                found[operand].add("/".join(key.key for key in path).removesuffix("_tap"))
    who = ("mlp/experts", "mlp/shared_experts")
    assert found == {"x": {"self_attn/o_proj", *(f"{w}/gate_up_proj" for w in who)}, "dy": {f"{w}/down_proj" for w in who}}


def test_the_fp8_oracle_is_as_near_as_e4m3_allows():
    """The released FP8 format, its weights used as they are. Errors are of the size of e4m3's, and not of bfloat16's."""
    folder = Path(__file__).parents[1] / "data" / "models" / "tiny_e_fp8_mtp"
    expected, model = dict(np.load(folder / "expected.npz")), dsv3_jax.load(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    tokens, exact = expected["ids48"], expected["logits_ids48"].astype(np.float64)
    ours = np.asarray(jax.jit(Decoder(model.config, FP8_REFERENCE).logits)(model.params, tokens), np.float64)
    distance = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 0.05 < distance < 0.3, distance  # bfloat16 arithmetic is at 0.01

    def cross_entropy(logits):
        logits = logits[:, :-1] - np.log(np.sum(np.exp(logits[:, :-1]), axis=-1, keepdims=True))
        return -np.mean(np.take_along_axis(logits, tokens[:, 1:, None], -1))

    np.testing.assert_allclose(cross_entropy(ours), cross_entropy(exact), rtol=2.5e-3)
