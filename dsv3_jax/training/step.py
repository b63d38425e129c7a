"""One training step, a pure function of (state, batch, what is scheduled); jitted, the state donated.

What here happens to one device's rows (`_gradients`) is spread over a mesh by dsv3_jax/parallel/spread.py; over a mesh with more than one
rank of `pipe` a pipeline computes the gradients (training/pipeline.py).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import buffers
from dsv3_jax.parallel.mesh import make, num_expert_parts
from dsv3_jax.parallel.spread import Spread
from dsv3_jax.precision import attach, forms, overflow_counters
from dsv3_jax.training import loss, optimizer, pipeline, router_bias
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
    """The step of a configuration on a mesh (by default one device): `init` makes a state, `step` goes on from it.

    shardings: where a state's arrays lie, a TrainState of them; batch_sharding: where a batch does.
    """

    def __init__(self, decoder: Decoder, config: TrainConfig, mesh: jax.sharding.Mesh | None = None):
        self.config = config
        self.spread = Spread(decoder, mesh or make("data=1", jax.devices()[:1]))
        self.buffers = buffers.Buffers(buffers.start(config.model, num_expert_parts(self.spread.mesh.shape)))
        weights_axes, _ = router_bias.split(decoder.logical_axes())
        self.optimizer = optimizer.adamw(config.optimizer, optimizer.decayed(weights_axes))
        masters, whole = self.spread.shardings, jax.sharding.NamedSharding(self.spread.mesh, jax.sharding.PartitionSpec())
        moments, _ = router_bias.split(masters)
        ema = masters if config.optimizer.ema_decay is not None else None
        self.shardings = TrainState(masters, optimizer.AdamState(whole, moments, moments), whole, whole, ema)
        self.batch_sharding = self.spread.batch_sharding
        self._steps, self._losses = {}, {}  # compiled, by the size of the exchange's buffers

    def init(self, params: dict) -> TrainState:
        """The state before the first step of training `params` (float32)."""
        ema = jax.tree.map(jnp.copy, params) if self.config.optimizer.ema_decay is not None else None
        return TrainState(params, self.optimizer.init(router_bias.split(params)[0]), jnp.int32(0), jnp.int32(0), ema)

    def step(self, state: TrainState, batch: dict, scheduled: Scheduled) -> tuple[TrainState, dict]:
        """One optimizer step over a batch (see training/loss.py); the state is donated.

        Returns the new state and metrics, float32 scalars: "loss", its terms before their weights, "grad_norm" (before clipping),
        "skipped" and "skipped_in_row"; "fill" of the exchange's buffers; "load" [L, E]; and in FP8 recipes "overflow" (see
        `precision.overflow_counters`).
        """
        while True:
            size = self.buffers.size
            state, metrics = self.jitted(size)(state, batch, scheduled)
            if self._had_room(metrics["fill"]):
                return state, metrics

    def jitted(self, size: float) -> Callable:
        """`step` as one program, with buffers of that size."""
        if size not in self._steps:
            one = functools.partial(self._step, self.spread.decoder(size))
            # Metrics lie on every device, or a process of several could not read them.
            self._steps[size] = jax.jit(one, donate_argnums=0, out_shardings=(self.shardings, self.shardings.skipped))
        return self._steps[size]

    def next_token_loss(self, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        """`loss.next_token_loss` of a batch: (nats, how many tokens)."""
        while True:
            size = self.buffers.size
            if size not in self._losses:
                local = functools.partial(loss.next_token_loss, self.spread.decoder(size))
                self._losses[size] = jax.jit(self.spread.sums(local))
            sums, fill = self._losses[size](params, batch)
            if self._had_room(fill):
                return sums

    def _had_room(self, fill: jax.Array) -> bool:
        """False: nothing has changed and it is to be run again, with larger buffers. Reading `fill` waits for the device."""
        return not self.spread.has_buffers or self.buffers.enough(float(fill))

    def _step(self, decoder: Decoder, state: TrainState, batch: dict, scheduled: Scheduled) -> tuple[TrainState, dict]:
        options = self.config.optimizer
        weights, biases = router_bias.split(state.params)
        if self.spread.mesh.shape["pipe"] > 1:
            gradients, total, terms = self._pipelined_gradients(decoder, weights, biases, batch, scheduled)
        else:
            count = max(1, len(batch["tokens"]) // (self.config.microbatch_size or len(batch["tokens"])))
            local = functools.partial(self._gradients, decoder, count)
            gradients, total, terms = self.spread.gradients(local)(weights, biases, batch, scheduled)
        norm = optax.tree.norm(gradients)
        clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, options.clip_norm / (norm + 1e-6)), gradients)
        updates, adam = self.optimizer.update(clipped, state.adam, weights, learning_rate=scheduled.learning_rate)
        biases = router_bias.update(biases, terms["load"], scheduled.bias_update_speed)
        params = attach(optax.apply_updates(weights, updates), biases)

        ema = None
        if options.ema_decay is not None:
            ema = jax.tree.map(lambda e, p: e + (1 - options.ema_decay) * (p - e), state.ema, params)

        finite, had_room = jnp.isfinite(total) & jnp.isfinite(norm), terms["fill"] <= 1
        old, new = (state.params, state.adam, state.ema), (params, adam, ema)
        params, adam, ema = jax.tree.map(lambda old, new: jnp.where(finite & had_room, new, old), old, new)
        bad = (had_room & ~finite).astype(jnp.int32)
        in_row = jnp.where(had_room, (state.skipped_in_row + 1) * bad, state.skipped_in_row)
        state = TrainState(params, adam, state.skipped + bad, in_row, ema)
        return state, {"loss": total, **terms, "grad_norm": norm, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}

    def _pipelined_gradients(
        self, decoder: Decoder, weights: dict, biases: dict, batch: dict, scheduled: Scheduled
    ) -> tuple[Any, jax.Array, dict]:
        """The same as `_gradients`, spread, by the pipeline."""
        mesh = self.spread.mesh
        total, terms, gradients = pipeline.pipeline_value_and_grad(
            decoder,
            attach(weights, biases),
            batch,
            pipeline.schedule(self.config, mesh.shape, len(batch["tokens"])),
            mesh,
            mtp_loss_weight=scheduled.mtp_loss_weight,
            balance_loss_weight=self.config.optimizer.balance_loss_weight,
        )
        return router_bias.split(gradients)[0], total, terms

    def _gradients(
        self, decoder: Decoder, count: int, weights: dict, biases: dict, batch: dict, scheduled: Scheduled
    ) -> tuple[Any, jax.Array, dict]:
        """Float32 gradients of one device's loss, the loss and its terms, accumulated over `count` microbatches in float32."""
        over = jax.tree.map(lambda n: n / count, self.spread.mean(loss.num_targets(batch)))
        made = forms(decoder.layers(weights), decoder.recipe)  # once a step, not once a microbatch
        counters = overflow_counters(weights, decoder.recipe)

        def loss_of(weights, counters, microbatch):
            return loss.loss_and_terms(
                decoder,
                attach(decoder.layers(attach(weights, biases, counters)), made),
                microbatch,
                mtp_loss_weight=scheduled.mtp_loss_weight,
                balance_loss_weight=self.config.optimizer.balance_loss_weight,
                over=over,
            )

        def gradient_of(microbatch):
            differentiated = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
            (total, terms), (gradients, overflow) = differentiated(weights, counters, microbatch)
            return (total, terms | {"overflow": overflow}), gradients

        if count == 1:
            (total, terms), gradients = gradient_of(batch)
            return gradients, total, terms

        def add(sums, microbatch):
            more = gradient_of(microbatch)
            fill = jnp.maximum(sums[0][1]["fill"], more[0][1]["fill"])
            (total, terms), gradients = jax.tree.map(jnp.add, sums, more)
            return ((total, terms | {"fill": fill}), gradients), None

        # Microbatch i takes rows i, i + count, ...: where the batch lies over devices, each keeps its rows.
        microbatches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)
        first = jax.tree.map(lambda x: x[0], microbatches)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_of, first))
        ((total, terms), gradients), _ = jax.lax.scan(add, zeros, microbatches)
        mean = lambda tree: jax.tree.map(lambda x: x / count, tree)  # noqa: E731
        return mean(gradients), total / count, mean(terms) | {name: terms[name] for name in ("load", "fill", "overflow")}
