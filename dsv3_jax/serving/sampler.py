"""From logits to tokens, on the device.

A draw is the argmax of the filtered logits plus Gumbel noise, and the noise is a function of (seed, position) alone: a request gets
the same tokens in any batch, after a preemption, and with speculation on or off.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.serving.request import MAX_LOGPROBS, SamplingParams

_NUMBERS = (np.float32, np.float32, np.int32, np.float32, np.uint32)


class Rows(NamedTuple):
    """The sampling parameters of each row, arrays [B]."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    seed: jax.Array

    @classmethod
    def of(cls, params: list[SamplingParams]) -> "Rows":
        columns = zip(*[(p.temperature, p.top_p, p.top_k, p.min_p, p.seed % 2**32) for p in params])
        return cls(*map(np.array, columns, _NUMBERS))

    def packed(self) -> np.ndarray:
        """Their bits, int32 [B, 5]."""
        return np.stack([column.view(np.int32) for column in self], axis=1)

    @classmethod
    def unpacked(cls, bits_B5: jax.Array) -> "Rows":
        return cls(*(jax.lax.bitcast_convert_type(bits_B5[:, i], dtype) for i, dtype in enumerate(_NUMBERS)))


class Asked(NamedTuple):
    """What requests of a step ask for beyond the likeliest tokens: to be drawn, from filtered logits; log-probabilities; a bias."""

    draw: bool = False
    filtered: bool = False
    logprobs: bool = False
    bias: bool = False

    @classmethod
    def of(cls, params: list[SamplingParams]) -> "Asked":
        """All but `bias`."""
        drawn = [p for p in params if p.temperature > 0]
        filtered = any(p.top_p < 1 or p.top_k > 0 or p.min_p > 0 for p in drawn)
        return cls(bool(drawn), filtered, any(p.logprobs is not None for p in params))


class Sampled(NamedTuple):
    """tokens [B, Q] int32; with log-probabilities: theirs [B, Q] float32, and the likeliest tokens' [B, Q, 20]."""

    tokens: jax.Array
    logprobs: jax.Array | None = None
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def greedy(logits_BQW: jax.Array) -> jax.Array:
    """The likeliest tokens [B, Q]."""
    return jnp.argmax(logits_BQW, axis=-1).astype(jnp.int32)


def sample(logits_BQW: jax.Array, rows: Rows, positions_BQ: jax.Array, bias_BQW: jax.Array | None = None, *, asked: Asked) -> Sampled:
    """One token for every row of logits. positions: where the new tokens will stand; bias: added to the logits before all else.

    Log-probabilities are the model's own: of the logits before bias, temperature and filters.
    """
    biased_BQW = logits_BQW if bias_BQW is None else logits_BQW + bias_BQW
    tokens_BQ = greedy(biased_BQW)
    if asked.draw:
        below_BQW = biased_BQW - jnp.max(biased_BQW, axis=-1, keepdims=True)  # the likeliest stays finite at any temperature
        scaled_BQW = below_BQW / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None, None]
        if asked.filtered:
            scaled_BQW = filter_logits(scaled_BQW, rows)
        noise_BQW = jax.vmap(lambda seed, positions: _gumbel(seed, positions, logits_BQW.shape[-1]))(rows.seed, positions_BQ)
        drawn_BQ = greedy(scaled_BQW + noise_BQW)
        tokens_BQ = jnp.where(rows.temperature[:, None] > 0, drawn_BQ, tokens_BQ)
    if not asked.logprobs:
        return Sampled(tokens_BQ)
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
