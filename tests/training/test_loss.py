"""The loss against plain float64 arithmetic on the model's logits, and what each term's gradient reaches."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import Decoder
from dsv3_jax.precision.weights import attach
from dsv3_jax.training import loss, router_bias
from tests import draw

SIZE = (3, 20)  # B, S


@pytest.fixture(scope="module")
def decoder(micro_model):
    return Decoder(micro_model)


@pytest.fixture(scope="module")
def params(decoder):
    """Fresh parameters with a selection bias that is not zero, so that it could carry a gradient."""
    weights, biases = router_bias.split(draw.parameters(decoder))
    return attach(weights, jax.tree.map(lambda b: b + np.linspace(-0.1, 0.1, 8, dtype=np.float32), biases))


@pytest.fixture(scope="module")
def batch(micro_model):
    return {"tokens": np.random.default_rng(1).integers(0, micro_model.vocab_size, (SIZE[0], SIZE[1] + 1)).astype(np.int32)}


@functools.partial(jax.jit, static_argnums=0)
def terms_of(decoder, params, batch):
    return loss.loss_and_terms(decoder, params, batch, mtp_loss_weight=0.3, balance_loss_weight=0.01)


def nll(logits, targets):
    """−log p(target) of every position in float64 numpy."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def forward(decoder, params, tokens):
    hidden, stats = decoder(params, tokens[:, :-1])
    predicted, mtp_stats = decoder.mtp(params, hidden, tokens[:, 1:])
    balance = stats.balance_loss.sum() + mtp_stats.balance_loss
    return decoder.head(params, decoder.final_norm(params, hidden)), decoder.head(params, predicted), balance


def reference(decoder, params, tokens):
    """Per-position losses of the main model [B, S] and of MTP [B, S-1], from logits; and the balance losses' sum."""
    main, mtp, balance = forward(decoder, params, tokens)
    return nll(main, tokens[:, 1:]), nll(mtp[:, :-1], tokens[:, 2:]), balance


def test_terms_are_means_of_the_logits_losses(decoder, params, batch):
    total, terms = terms_of(decoder, params, batch)
    main, mtp, balance = reference(decoder, params, batch["tokens"])
    assert terms["main"] == pytest.approx(main.mean(), rel=1e-5)
    assert terms["mtp"] == pytest.approx(mtp.mean(), rel=1e-5)
    assert terms["balance"] == pytest.approx(float(balance), rel=1e-5)  # summed over layers
    assert total == pytest.approx(main.mean() + 0.3 * mtp.mean() + 0.01 * float(balance), rel=1e-5)
    assert terms["load"].shape == (2, 8)  # one MoE layer, then the MTP layer
    np.testing.assert_array_equal(terms["load"].sum(1), SIZE[0] * SIZE[1] * 2)


def test_each_term_is_averaged_once(decoder, params, batch):
    """Twice the same rows: the same terms, twice the load."""
    once = terms_of(decoder, params, batch)
    twice = terms_of(decoder, params, {"tokens": np.concatenate([batch["tokens"]] * 2)})
    for name in ("main", "mtp", "balance"):
        assert twice[1][name] == pytest.approx(float(once[1][name]), rel=1e-5) and once[1][name] > 0.1
    assert twice[0] == pytest.approx(float(once[0]), rel=1e-5)
    np.testing.assert_array_equal(twice[1]["load"], 2 * once[1]["load"])


def test_loss_mask(decoder, params, batch):
    mask = np.random.default_rng(0).integers(0, 2, SIZE).astype(np.float32)
    _, terms = terms_of(decoder, params, batch | {"loss_mask": mask})
    main, mtp, _ = reference(decoder, params, batch["tokens"])
    assert terms["main"] == pytest.approx((main * mask).sum() / mask.sum(), rel=1e-5)
    assert terms["mtp"] == pytest.approx((mtp * mask[:, 1:]).sum() / mask[:, 1:].sum(), rel=1e-5)


def test_nothing_to_predict_is_zero_and_not_nan(decoder, params, batch):
    _, terms = terms_of(decoder, params, batch | {"loss_mask": np.zeros(SIZE, np.float32)})
    assert terms["main"] == 0 and terms["mtp"] == 0


def test_segments_equal_documents_by_themselves(decoder, params, batch):
    """Three documents in a row with segment ids lose what they lose alone, within any mask; no target crosses."""
    documents = batch["tokens"]
    place = np.tile(np.arange(21, dtype=np.int32), 3)[None]
    row = {"tokens": documents.reshape(1, 63), "segment_ids": np.repeat(np.arange(3, dtype=np.int32), 21)[None], "positions": place}
    main, mtp, _ = reference(decoder, params, documents)
    for mask in (np.ones((1, 62), np.float32), np.random.default_rng(2).integers(0, 2, (1, 62)).astype(np.float32)):
        _, terms = terms_of(decoder, params, row | {"loss_mask": mask})
        mask = np.append(mask, 0).reshape(3, 21)[:, :20]
        assert terms["main"] == pytest.approx((main * mask).sum() / mask.sum(), rel=1e-5)
        assert terms["mtp"] == pytest.approx((mtp * mask[:, 1:]).sum() / mask[:, 1:].sum(), rel=1e-5)


def test_pieces_change_neither_loss_nor_gradient(decoder, params, batch, monkeypatch):
    """Logits of few tokens at a time (with padding: 3 pieces do not divide 20) against the gradient of the plain formula."""

    def plain(params):
        tokens = batch["tokens"]
        logits = decoder.logits(params, tokens[:, :-1])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1))

    def in_pieces(params):
        return loss.loss_and_terms(decoder, params, batch, mtp_loss_weight=0.0, balance_loss_weight=0.0)[0]

    expected = jax.jit(jax.value_and_grad(plain))(params)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", SIZE[0] * 7 * 300)
    found = jax.jit(jax.value_and_grad(in_pieces))(params)
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1])):
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * float(np.abs(b).max()))


def test_all_logits_never_exist(decoder, params, monkeypatch):
    """No array of the differentiated loss is as large as the logits of the batch would be."""
    big = Decoder(dataclasses.replace(decoder.config, vocab_size=5000, num_nextn_predict_layers=0))
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * 16 * 5000)
    batch = {"tokens": jax.ShapeDtypeStruct((4, 257), jnp.int32)}
    gradient = jax.grad(lambda p, b: loss.loss_and_terms(big, p, b, mtp_loss_weight=0.0, balance_loss_weight=0.0)[0])
    jaxpr = jax.make_jaxpr(gradient)(big.abstract_params(), batch)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in eqn.outvars if 5000 in v.aval.shape)
            for value in eqn.params.values():
                if (inner := getattr(value, "jaxpr", value)) and hasattr(inner, "eqns"):
                    yield from sizes(inner)

    largest = max(sizes(jaxpr.jaxpr))
    assert 4 * 16 * 5000 <= largest < 4 * 256 * 5000  # the logits of a piece; less than those of the batch


@pytest.fixture(scope="module")
def gradients(decoder, params, batch):
    """For each term: the largest entry of its gradient for every parameter, by path."""

    def terms(params):
        _, terms = loss.loss_and_terms(decoder, params, batch, mtp_loss_weight=1.0, balance_loss_weight=1.0)
        return jnp.stack([terms["main"], terms["mtp"], terms["balance"]])

    jacobian = jax.device_get(jax.jit(jax.jacrev(terms))(params))  # leaves [3, ...]
    return {
        term: {jax.tree_util.keystr(path): float(np.abs(leaf[i]).max()) for path, leaf in jax.tree_util.tree_leaves_with_path(jacobian)}
        for i, term in enumerate(("main", "mtp", "balance"))
    }


def names(gradients, term, zero):
    return {name for name, size in gradients[term].items() if (size == 0) == zero}


def test_main_reaches_all_but_mtp_and_biases(gradients):
    assert names(gradients, "main", zero=True) == {n for n in gradients["main"] if n.startswith("['mtp']") or "bias" in n}


def test_mtp_reaches_everything_but_the_biases(gradients):
    assert names(gradients, "mtp", zero=True) == {n for n in gradients["mtp"] if "bias" in n}


def test_balance_reaches_routers_and_what_feeds_them(gradients):
    """Not the head, nor what comes after the last router, nor the biases."""
    after = ("['mtp']['layer']['mlp']['experts']", "['mtp']['layer']['mlp']['shared_experts']", "['mtp']['norm']", "['lm_head']")
    assert names(gradients, "balance", zero=True) == {n for n in gradients["balance"] if n.startswith(after) or "bias" in n}
    assert gradients["balance"]["['moe_layers']['mlp']['gate']['weight']"] > 0
    assert gradients["balance"]["['mtp']['layer']['mlp']['gate']['weight']"] > 0


def test_next_token_loss_is_the_sum_of_main(decoder, params, batch):
    """Of the targets within the mask."""
    mask = np.random.default_rng(3).integers(0, 2, SIZE).astype(np.float32)
    (nats, count), _ = jax.jit(lambda p, b: loss.next_token_loss(decoder, p, b))(params, batch | {"loss_mask": mask})
    main, _, _ = reference(decoder, params, batch["tokens"])
    assert count == mask.sum() and nats == pytest.approx((main * mask).sum(), rel=1e-5)


def test_dense_model_without_mtp(micro_model):
    decoder = Decoder(dataclasses.replace(micro_model, first_k_dense_replace=2, num_nextn_predict_layers=0))
    batch = {"tokens": np.arange(22, dtype=np.int32).reshape(2, 11)}
    total, terms = terms_of(decoder, draw.parameters(decoder), batch)
    assert total == terms["main"] > 0 and terms["mtp"] == terms["balance"] == 0 and terms["load"].shape == (0, 8)
