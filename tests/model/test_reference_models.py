"""The model against other software's values: logits, every layer, router, greedy tokens, loss, gradients, MTP.

Tolerances are those of two float32 implementations: 1e-4 on logits and hidden states, 1e-5 on router weights and losses, 1e-4
relative on gradients; experts and tokens exactly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.hub.names import tensors_of
from dsv3_jax.model import Decoder
from dsv3_jax.model.moe import exchange_locally

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# The second has all that the first has, and its logits and the tests of Moonlight, which has neither YaRN nor MTP, are quick.
V3 = [slow("tiny_s_plain"), "tiny_s_yarn_mtp"]
V2_AND_MOONLIGHT = ["tiny_v2_lite", "tiny_v2", "tiny_moonlight"]
# Tests compile with less of LLVM's work (tests/conftest.py), which must not be what makes them pass.
AS_USERS_COMPILE = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


class Recorder:
    """Runs a model and sees what goes on inside: hidden states after any layer, and each router's choice."""

    def __init__(self, model):
        self.model, self.seen = model, []

        def exchange(x_TD, routing, experts):
            chosen = routing.experts_TK, routing.weights_TK
            jax.debug.callback(lambda *chosen: self.seen.append([np.asarray(c) for c in chosen]), *chosen, ordered=True)
            return exchange_locally(x_TD, routing, experts)

        config = dataclasses.replace(model.config, num_nextn_predict_layers=0)
        self.run = jax.jit(Decoder(config, exchange=exchange).__call__)

    def hidden(self, ids, layers):
        """Hidden states [B, S, D] after the first `layers` layers: the others are made to add nothing, which needs no other program."""

        def silence(stack, first):
            def leaf(path, value):
                rows = np.arange(value.shape[0]) + first < layers
                is_last = path[-1].key in ("o_proj", "down_proj")
                return value * rows.reshape(-1, *[1] * (value.ndim - 1)) if is_last else value

            return jax.tree_util.tree_map_with_path(leaf, stack)

        params = jax.device_get(self.model.params)
        params["dense_layers"] = silence(params["dense_layers"], 0)
        params["moe_layers"] = silence(params["moe_layers"], self.model.config.first_k_dense_replace)
        return self.run(params, jnp.asarray(ids)).hidden_BSD

    def routing(self, ids):
        """(layer, experts [T, K], weights [T, K]) of each MoE layer, sorted by expert."""
        self.seen.clear()
        jax.block_until_ready(self.run(self.model.params, jnp.asarray(ids)))
        jax.effects_barrier()
        assert len(self.seen) == self.model.config.num_moe_layers
        for layer, (experts, weights) in enumerate(self.seen, self.model.config.first_k_dense_replace):
            order = np.argsort(experts, axis=-1)
            yield layer, np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1)


def by_name(config, params) -> dict[str, np.ndarray]:
    """A tree like the parameters as tensors under checkpoint names."""
    params = jax.device_get(params)

    def leaf(path):
        tree = params
        for key in path:
            tree = tree[key]
        return tree

    return {t.name: leaf(t.path)[t.index] for t in tensors_of(config) if not t.copy}


def close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["tiny_s_plain", "tiny_s_yarn_mtp"])
@pytest.mark.parametrize("ids", [slow("ids48"), "ids200"])  # hidden states of every layer are of ids48
def test_logits(reference, name, ids):
    model, expected = reference(name)
    close(model(expected[ids]), expected[f"logits_{ids}"], 1e-4)


def test_packed_documents_are_as_if_alone(reference):
    """Both rows of ids48 one behind the other."""
    model, expected = reference("tiny_s_plain")
    count, length = expected["ids48"].shape
    segments, positions = np.divmod(np.arange(count * length, dtype=np.int32)[None], length)
    logits = jax.jit(model.apply)(model.params, expected["ids48"].reshape(1, -1), positions=positions, segment_ids=segments)
    close(logits, expected["logits_ids48"].reshape(1, count * length, -1), 1e-4)


@pytest.mark.parametrize("name", V3)
def test_hidden_states_and_routers_of_every_layer(reference, name):
    model, expected = reference(name)
    recorder, ids = Recorder(model), jnp.asarray(expected["ids48"])
    close(model.decoder.embed(model.params, ids), expected["h_embed_ids48"], 1e-4)
    for layer in range(model.config.num_hidden_layers):
        hidden_BSD = recorder.hidden(ids, layer + 1)
        close(hidden_BSD, expected[f"h_layer{layer}_ids48"], 1e-4)
    close(model.decoder.final_norm(model.params, hidden_BSD), expected["h_final_norm_ids48"], 1e-4)
    for layer, experts, weights in recorder.routing(ids):
        np.testing.assert_array_equal(experts, expected[f"router_idx_layer{layer}_ids48"])
        close(weights, expected[f"router_w_layer{layer}_ids48"], 1e-5)


# tests/serving/test_engine.py has the same tokens.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_s_plain", "tiny_s_yarn_mtp", "tiny_e_fp8_mtp"])
def test_greedy_tokens(reference, name):
    model, expected = reference(name)
    tokens = model.generate(expected["prompts"].tolist(), max_new_tokens=32, ignore_eos=True)
    np.testing.assert_array_equal(tokens, expected["greedy_tokens"])


def losses_and_gradients(model, ids, **compiler_options):
    """A function of two weights: (terms, loss, gradient of weight · loss + weight · main term). One program for both gradients."""
    batch = {"tokens": ids}

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def run(params, of_loss, of_main):
        def both(params):
            loss, terms = model.loss(params, batch)
            return (loss, terms["main"]), terms

        (loss, _), backward, terms = jax.vjp(both, params, has_aux=True)
        return terms, loss, backward((of_loss, of_main))[0]

    return lambda of_loss, of_main: run(model.params, jnp.float32(of_loss), jnp.float32(of_main))


@pytest.mark.parametrize("name", V3)
def test_loss_and_gradients(reference, name):
    model, expected = reference(name)
    run = losses_and_gradients(model, expected["ids48"], **(AS_USERS_COMPILE if name == "tiny_s_yarn_mtp" else {}))
    terms, loss, gradients = run(0, 1)
    close(terms["main"], expected["lm_loss_ids48"], 1e-5)
    gradients = by_name(model.config, gradients)
    check_gradients(gradients, expected, "grad")
    for key in (key for key in expected if key.startswith("grad::")):
        close(gradients[key.removeprefix("grad::")], expected[key], 1e-4 * np.abs(expected[key]).max())
    if model.config.num_nextn_predict_layers:
        close(terms["mtp"], expected["mtp_ce_mean_valid_ids48"], 1e-5)
        close(loss, expected["joint_total_loss"], 1e-5)
        check_gradients(by_name(model.config, run(1, 0)[2]), expected, "joint_grad")
    else:
        close(loss, expected["lm_loss_ids48"], 1e-5)


def check_gradients(gradients, expected, prefix):
    """Norm, sum and largest entry of every tensor's gradient."""
    names = expected[f"{prefix}_names"].tolist()
    assert set(names) <= gradients.keys()
    for name, norm, total in zip(names, expected[f"{prefix}_norm"], expected.get(f"{prefix}_sum", [None] * len(names))):
        gradient = gradients[name].astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-4, atol=1e-9, err_msg=name)
        if total is not None:
            # Entries cancel in a sum: what is right to 1e-4 of the norm each way may be off by that much of it.
            np.testing.assert_allclose(gradient.sum(), total, rtol=1e-4, atol=1e-4 * norm, err_msg=name)
    if f"{prefix}_absmax" in expected:
        largest = [np.abs(gradients[name]).max() for name in names]
        np.testing.assert_allclose(largest, expected[f"{prefix}_absmax"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["tiny_s_yarn_mtp", "tiny_e_fp8_mtp"])
def test_mtp_logits(reference, name):
    model, expected = reference(name)
    close(model.mtp(expected["ids48"]), expected["mtp_logits_ids48"], 1e-4)


def test_mtp_on_hidden_states_before_the_final_norm(reference):
    model, expected = reference("tiny_s_yarn_mtp")
    config = dataclasses.replace(model.config, mtp_hidden="pre_norm")
    close(dsv3_jax.Model(config, model.params).mtp(expected["ids48"]), expected["mtp_logits_prenorm_h_ids48"], 1e-4)


# Dequantised it is in tests/serving/test_engine.py.
@pytest.mark.parametrize("weights", ["stored", slow("dequantised")])
def test_fp8_checkpoint(reference, weights):
    model, expected = reference("tiny_e_fp8_mtp", weights=weights)
    close(model(expected["ids48"]), expected["logits_ids48"], 1e-4)


@pytest.mark.parametrize("name", V2_AND_MOONLIGHT)
def test_v2_and_moonlight(reference, name):
    model, expected = reference(name)
    recorder, ids = Recorder(model), expected["ids"]
    close(model(ids), expected["logits"], 1e-4)
    for layer in range(1, model.config.num_hidden_layers):
        close(recorder.hidden(ids, layer), expected[f"hidden_{layer}"], 1e-4)
    for layer, experts, weights in recorder.routing(ids):
        np.testing.assert_array_equal(experts, expected[f"experts_{layer}"])
        close(weights, expected[f"weights_{layer}"], 1e-5 * model.config.routed_scaling_factor)


# What V2 has beside V2-Lite, groups and a latent of queries, is in the gradients of V3 as well.
@pytest.mark.parametrize("name", ["tiny_v2_lite", slow("tiny_v2"), "tiny_moonlight"])
def test_v2_and_moonlight_gradients(reference, name):
    model, expected = reference(name)
    terms, _, gradients = losses_and_gradients(model, expected["ids"])(0, 1)
    close(terms["main"], expected["loss"], 1e-5)
    check_gradients(by_name(model.config, gradients), expected, "grad")


def test_v2_greedy_tokens(reference):
    model, expected = reference("tiny_v2_lite")
    tokens = model.generate(expected["ids"][:, :12].tolist(), max_new_tokens=16, ignore_eos=True)
    np.testing.assert_array_equal(tokens, expected["greedy"])
