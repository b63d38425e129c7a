"""One training step, a pure function of (state, batch, what is scheduled); jitted, the state donated.

Nothing here knows a mesh: where arrays lie is decided by whoever places state and batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.precision.weights import attach, quantize_params
from dsv3_jax.training import loss, optimizer, router_bias
from dsv3_jax.training.schedules import Scheduled


class TrainState(NamedTuple):
    """All that a step changes. The position in the data (step, rows, tokens) is the host's.

    params: float32 masters and router biases; adam: AdamState; skipped, skipped_in_row: int32, steps that were left out because loss
    or gradient was not finite; ema: the moving average of the params, or None.
    """

    params: dict
    adam: optimizer.AdamState
    skipped: jax.Array
    skipped_in_row: jax.Array
    ema: dict | None


class Trainer:
    """The step of a configuration: `init` makes a state, `step` is the jitted step."""

    def __init__(self, decoder: Decoder, config: TrainConfig):
        self.decoder, self.config = decoder, config
        weights_axes, _ = router_bias.split(decoder.logical_axes())
        self.optimizer = optimizer.adamw(config.optimizer, optimizer.decayed(weights_axes))
        self.step = jax.jit(self._step, donate_argnums=0)

    def init(self, params: dict) -> TrainState:
        """The state before the first step of training `params` (float32)."""
        zero = jnp.zeros((), jnp.int32)
        ema = jax.tree.map(jnp.copy, params) if self.config.optimizer.ema_decay is not None else None
        return TrainState(params, self.optimizer.init(router_bias.split(params)[0]), zero, zero, ema)

    def _step(self, state: TrainState, batch: dict, scheduled: Scheduled) -> tuple[TrainState, dict]:
        """One optimizer step over a batch (see training/loss.py).

        Returns the new state and metrics, float32 scalars: "loss", its terms before their weights, "grad_norm" (before clipping),
        "skipped" and "skipped_in_row"; and "load" [L, E].
        """
        options = self.config.optimizer
        weights, biases = router_bias.split(state.params)
        gradients, total, terms = self._gradients(weights, biases, batch, scheduled)
        norm = optax.global_norm(gradients)
        clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, options.clip_norm / (norm + 1e-6)), gradients)
        updates, adam = self.optimizer.update(clipped, state.adam, weights, learning_rate=scheduled.learning_rate)
        biases = router_bias.update(biases, terms["load"], scheduled.bias_update_speed)
        params = attach(optax.apply_updates(weights, updates), biases)

        ema = None
        if options.ema_decay is not None:
            ema = jax.tree.map(lambda e, p: e + (1 - options.ema_decay) * (p - e), state.ema, params)

        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        old, new = (state.params, state.adam, state.ema), (params, adam, ema)
        params, adam, ema = jax.tree.map(lambda old, new: jnp.where(finite, new, old), old, new)
        bad = 1 - finite.astype(jnp.int32)
        state = TrainState(params, adam, state.skipped + bad, (state.skipped_in_row + 1) * bad, ema)
        return state, {"loss": total, **terms, "grad_norm": norm, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}

    def _gradients(self, weights: dict, biases: dict, batch: dict, scheduled: Scheduled) -> tuple[Any, jax.Array, dict]:
        """Float32 gradients of the batch's loss, the loss and its terms, accumulated over microbatches in float32."""
        count = max(1, len(batch["tokens"]) // (self.config.microbatch_size or len(batch["tokens"])))
        over = jax.tree.map(lambda n: n / count, loss.num_targets(batch))
        fp8 = quantize_params(weights, self.decoder.recipe)  # once a step, not once a microbatch

        def loss_of(weights, microbatch):
            return loss.loss_and_terms(
                self.decoder,
                attach(weights, biases, fp8),
                microbatch,
                mtp_loss_weight=scheduled.mtp_loss_weight,
                balance_loss_weight=self.config.optimizer.balance_loss_weight,
                over=over,
            )

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        if count == 1:
            (total, terms), gradients = gradient_of(weights, batch)
            return gradients, total, terms

        def add(sums, microbatch):
            return jax.tree.map(jnp.add, sums, gradient_of(weights, microbatch)), None

        # Microbatch i takes rows i, i + count, ...: where the batch lies over devices, each keeps its rows.
        microbatches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)
        first = jax.tree.map(lambda x: x[0], microbatches)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_of, weights, first))
        ((total, terms), gradients), _ = jax.lax.scan(add, zeros, microbatches)
        mean = lambda tree: jax.tree.map(lambda x: x / count, tree)  # noqa: E731
        return mean(gradients), total / count, mean(terms) | {"load": terms["load"]}
