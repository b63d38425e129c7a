"""The sampler against numpy, and its draws against the distribution they should have."""

import jax
import numpy as np
import pytest

from dsv3_jax.serving.request import SamplingParams, derive_seed
from dsv3_jax.serving.sampler import Asked, Rows, filter_logits, sample

LOGITS = np.log(np.array([0.4, 0.05, 0.25, 0.02, 0.18, 0.1], np.float32))


compiled = jax.jit(sample, static_argnames="asked")


def tokens(logits, params, positions):
    """As a step samples them: the parameters travel as bits."""
    bits = Rows.of(params).packed()
    return np.asarray(compiled(logits, Rows.unpacked(bits), positions, asked=Asked.of(params)).tokens)


def distribution(logits, params):
    """What a draw should be distributed as: temperature, then the top_k likeliest, then the fewest that reach top_p, and min_p."""
    p = np.exp(logits / params.temperature - np.max(logits / params.temperature))
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: params.top_k or None]
    within = p[kept] / p[kept].sum()
    kept = kept[: int(np.searchsorted(np.cumsum(within), params.top_p - 1e-6)) + 1]
    kept = kept[p[kept] >= params.min_p * p.max()]
    return np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.5),
        dict(top_k=3),
        dict(top_p=0.7),
        dict(top_p=0.001),
        dict(min_p=0.3),
        dict(temperature=2.0, top_k=4, top_p=0.8, min_p=0.2),
    ],
)
def test_draws_follow_the_distribution(options):
    params, draws = SamplingParams(**{"temperature": 1.0} | options), 20_000
    logits = np.broadcast_to(LOGITS, (1, draws, len(LOGITS)))
    drawn = tokens(logits, [params], np.arange(draws)[None])[0]
    expected, seen = distribution(LOGITS, params), np.bincount(drawn, minlength=len(LOGITS)) / draws
    assert not np.any(seen[expected == 0])
    # Five standard deviations of a binomial.
    np.testing.assert_array_less(np.abs(seen - expected), 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9)


def test_filters_of_each_row_are_its_own():
    rng = np.random.default_rng(0)
    params = [SamplingParams(top_k=5), SamplingParams(top_p=0.3), SamplingParams(min_p=0.5), SamplingParams(top_k=9, top_p=0.6, min_p=0.1)]
    logits = rng.normal(size=(4, 1, 200)).astype(np.float32)
    filtered = np.asarray(filter_logits(logits, Rows.of(params)))
    for row, p in enumerate(params):
        np.testing.assert_array_equal(np.isfinite(filtered[row, 0]), distribution(logits[row, 0], p) > 0)


def test_a_draw_depends_on_seed_and_position_only():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 1, 50)).astype(np.float32)
    params = [SamplingParams(seed=i, temperature=1 + i) for i in range(6)]
    together = tokens(logits, params, np.full((6, 1), 9))
    alone = [tokens(logits[i : i + 1], params[i : i + 1], np.full((1, 1), 9))[0, 0] for i in range(6)]
    assert together[:, 0].tolist() == alone
    flat = np.zeros((1, 64, 50), np.float32)
    one, other = (tokens(flat, [SamplingParams(seed=s)], np.arange(64)[None]) for s in (1, 2))
    assert len(set(one[0].tolist())) > 20 and np.mean(one == other) < 0.3


def test_greedy_rows_stay_greedy_beside_draws():
    logits = np.random.default_rng(2).normal(size=(2, 1, 50)).astype(np.float32)
    params = [SamplingParams(temperature=0, top_k=3), SamplingParams(temperature=1, top_k=3)]
    assert tokens(logits, params, np.zeros((2, 1), np.int32))[0, 0] == logits[0].argmax()


def test_next_to_no_temperature_draws_the_likeliest():
    logits = np.array([[[1.0, 9.0, 10.0, 8.0]]], np.float32)
    assert tokens(logits, [SamplingParams(temperature=1e-37)], np.zeros((1, 1), np.int32)) == 2


def test_derived_seeds_differ():
    seeds = {derive_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 2500
