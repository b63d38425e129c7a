"""From logits to tokens, on the device.

A draw is the argmax of the filtered logits plus Gumbel noise, and the noise is a function of (seed, position) alone: a request gets
the same tokens in any batch, after a preemption, and with speculation on or off.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.serving.request import MAX_LOGPROBS, SamplingParams

_GREEDY = SamplingParams(temperature=0)


class Rows(NamedTuple):
    """The sampling parameters of each row, arrays [B]."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray

    @classmethod
    def of(cls, params: list[SamplingParams], size: int) -> "Rows":
        """Padded with greedy rows to `size`."""
        if not any(p.temperature for p in params):
            return _greedy(size)
        params = params + [_GREEDY] * (size - len(params))
        columns = zip(*[(p.temperature, p.top_p, p.top_k, p.min_p, p.seed % 2**32) for p in params])
        return cls(*map(np.array, columns, (np.float32, np.float32, np.int32, np.float32, np.uint32)))


@functools.cache
def _greedy(size: int) -> Rows:
    """Rows that nothing is read of: most steps have no others."""
    return Rows(*[np.zeros(size, dtype) for dtype in (np.float32, np.float32, np.int32, np.float32, np.uint32)])


class Sampled(NamedTuple):
    """tokens [B, Q] int32; with log-probabilities: theirs [B, Q] float32, and the likeliest tokens' [B, Q, 20]."""

    tokens: jax.Array
    logprobs: jax.Array | None
    top_tokens: jax.Array | None
    top_logprobs: jax.Array | None


def sample(logits_BQW: jax.Array, rows: Rows, positions_BQ: np.ndarray, *, logprobs: bool = False, bias_BQW=None) -> Sampled:
    """One token for every row of logits. positions: where the new tokens will stand; bias: added to the logits before all else.

    Log-probabilities are the model's own: of the logits before bias, temperature and filters.
    """
    draw = bool(np.any(rows.temperature > 0))
    filtered = draw and bool(np.any((rows.top_p < 1) | (rows.top_k > 0) | (rows.min_p > 0)))
    return _sample(logits_BQW, rows, positions_BQ, bias_BQW, draw=draw, filtered=filtered, logprobs=logprobs)


@functools.partial(jax.jit, static_argnames=("draw", "filtered", "logprobs"))
def _sample(logits_BQW, rows, positions_BQ, bias_BQW, *, draw, filtered, logprobs):
    biased_BQW = logits_BQW if bias_BQW is None else logits_BQW + bias_BQW
    tokens_BQ = jnp.argmax(biased_BQW, axis=-1).astype(jnp.int32)
    if draw:
        scaled_BQW = biased_BQW / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None, None]
        if filtered:
            scaled_BQW = filter_logits(scaled_BQW, rows)
        noise_BQW = jax.vmap(lambda seed, positions: _gumbel(seed, positions, logits_BQW.shape[-1]))(rows.seed, positions_BQ)
        drawn_BQ = jnp.argmax(scaled_BQW + noise_BQW, axis=-1).astype(jnp.int32)
        tokens_BQ = jnp.where(rows.temperature[:, None] > 0, drawn_BQ, tokens_BQ)
    if not logprobs:
        return Sampled(tokens_BQ, None, None, None)
    all_BQW = jax.nn.log_softmax(logits_BQW, axis=-1)
    top_BQN, top_tokens_BQN = jax.lax.top_k(all_BQW, min(MAX_LOGPROBS, all_BQW.shape[-1]))
    return Sampled(tokens_BQ, jnp.take_along_axis(all_BQW, tokens_BQ[..., None], axis=-1)[..., 0], top_tokens_BQN, top_BQN)


def filter_logits(logits_BQW: jax.Array, rows: Rows) -> jax.Array:
    """−inf for what top_k, then top_p of what is left, and min_p exclude. Tokens as likely as the last one kept are kept too."""
    per_row = lambda values: values[:, None, None]  # noqa: E731
    size = logits_BQW.shape[-1]
    ordered = -jnp.sort(-logits_BQW, axis=-1)
    rank = jnp.arange(size)
    kept = rank < jnp.where(per_row(rows.top_k) > 0, per_row(rows.top_k), size)
    probabilities = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the likelier ones: the first one is always kept
    kept &= (before < per_row(rows.top_p)) | (per_row(rows.top_p) >= 1)  # rounding could bring the sum to 1 early
    kept &= probabilities >= per_row(rows.min_p) * probabilities[..., :1]
    last = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BQW >= last, logits_BQW, -jnp.inf)


def _gumbel(seed, positions_Q, size):
    key = jax.random.key(seed)
    return jax.vmap(lambda position: jax.random.gumbel(jax.random.fold_in(key, position), (size,)))(positions_Q)
