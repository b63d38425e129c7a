"""One pipeline rank at work, inside `shard_map`: the scan over the ticks of a schedule's table.

    read what waits in the rings -> switch on the action -> write what it left -> exchange with the neighbours -> write what arrived
    after a forward of the last stage: the output loss and its gradient, by all ranks together

The collectives of the experts run inside the switch: devices at the same place of `pipe` do the same, so all members of their groups
meet. Those over `pipe` stay outside, since neighbours do different things. Rings are written outside as well: carried through the branches
they would be copied whole. The large ones are read inside, by the actions that need them.

In lockstep all ranks would wait for the one that has the head and the MTP module, which cost several layers: so each takes its share.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.model import Decoder
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.parallel.schedule_table import NONE, Table, columns_of_all, columns_of_ranks
from dsv3_jax.parallel.stage import Kept, Place, Stage, Weights, empty
from dsv3_jax.precision import attach

# (parameters outside the stacks, hidden [B, S, D] after the last layer, microbatch, arguments, axis) -> (loss, (terms, fill)): sums over
# rows, which may be some of a microbatch's. axis: of devices that have been given the same rows; the sum is the mean of what they return.
OutputLoss = Callable[[dict, jax.Array, dict, Any, str | None], tuple[jax.Array, tuple[dict, jax.Array]]]


class Objective(NamedTuple):
    """The loss of a microbatch: the output loss plus balance_weight times the balance loss of each MoE layer. forms: of the parameters
    outside the stacks, as `precision.forms` gives them."""

    output_loss: OutputLoss
    forms: dict
    arguments: Any
    balance_weight: jax.Array


class Sums(NamedTuple):
    """What a rank adds up over its microbatches.

    layers: gradients, per chunk and slot a Weights; shared: gradients of the parameters outside the stacks; loss: as far as it arises on
    this rank; terms, fill: of the output loss; stats: per chunk and slot (load [E], balance loss).
    """

    layers: tuple
    shared: dict
    loss: jax.Array
    terms: dict
    fill: jax.Array
    stats: tuple


class Rings(NamedTuple):
    """Values that wait, leaves [slots, ...]. Both chunks share a ring. Of forward and backward one slot more, for writes to nowhere."""

    forward: jax.Array  # inputs of stages that have arrived
    backward: jax.Array  # cotangents of outputs that have arrived; at the last stage those of the output loss
    kept: Any  # by stages whose backward is to come
    stash: Any  # operands of weight gradients


class Reads(NamedTuple):
    """What an action works with."""

    x_BSD: jax.Array  # input of the forward
    dy_BSD: jax.Array  # cotangent
    kept: Place
    stash: Place
    f_batch: dict
    b_batch: dict


class Writes(NamedTuple):
    """What an action leaves: the output of its forward and what that kept, the input cotangent of its backward, the stash of an input
    gradient."""

    y_BSD: jax.Array
    dx_BSD: jax.Array
    kept: Any
    stash: Any


class Pool:
    """Values of a chunk's layers in the form that both chunks share: of each stack as many as the longer one has. like: their shapes."""

    def __init__(self, stages: tuple[Stage, ...], values: list[tuple]):
        self._stages, self.like = stages, {}
        for p, of_chunk in zip(range(len(stages)), values):
            for stack, some in self._by_stack(p, of_chunk).items():
                self.like[stack] = max(self.like.get(stack, []), some, key=len)

    def pooled(self, p: int, values: tuple) -> dict[str, list]:
        """Where chunk p has no layer stands nothing, which is written nowhere."""
        of_chunk = self._by_stack(p, values)
        return {stack: [*(have := of_chunk.get(stack, [])), *empty(like[len(have) :])] for stack, like in self.like.items()}

    def write(self, ring: dict[str, list], slot_of_chunk: jax.Array, slots: int, pool: dict[str, list]) -> dict[str, list]:
        """slot_of_chunk: for each chunk where its values go, `slots`: nowhere. Only layers that this rank has are written: much of a
        microbatch's values would be others."""

        def write(stack, j):
            slot = jnp.int32(slots)
            for p, stage in enumerate(self._stages):
                present = [layer.present for layer in stage.layers if layer.program.stack == stack]
                slot = jnp.where(present[j], jnp.minimum(slot, slot_of_chunk[p]), slot) if j < len(present) else slot
            return _write_if_any(ring[stack][j], slot, slots, pool[stack][j])

        return {stack: [write(stack, j) for j in range(len(of_stack))] for stack, of_stack in ring.items()}

    def places(self, p: int, place: Place) -> tuple[Place, ...]:
        """Those of the layers of chunk p in a slot of the ring."""
        rings = {stack: iter(of_stack) for stack, of_stack in place.ring.items()}
        return tuple(Place(next(rings[layer.program.stack]), place.slot) for layer in self._stages[p].layers)

    def _by_stack(self, p: int, values: tuple) -> dict[str, list]:
        stacks: dict[str, list] = {}
        for layer, value in zip(self._stages[p].layers, values, strict=True):
            stacks.setdefault(layer.program.stack, []).append(value)
        return stacks


class Rank:
    """index: of this rank along `pipe`, traced. stages: a Stage for each chunk. shared: parameters outside the stacks, float32 masters.
    microbatches: leaves [count, B, ...], this device's."""

    def __init__(self, decoder: Decoder, table: Table, index: jax.Array, stages, shared: dict, microbatches: dict, objective: Objective):
        self.decoder, self.table, self.index, self.stages = decoder, table, index, stages
        self.shared, self.microbatches, self.objective = shared, microbatches, objective
        ranks, schedule = range(table.schedule.num_ranks), table.schedule
        # The rank where chunk p is the first stage, the last stage; where it takes its input, or its cotangent, from the rank itself.
        chunks = range(schedule.num_chunks)
        self.first = [_only(r for r in ranks if schedule.producer(r, p) is None) for p in chunks]
        self.last = [_only(r for r in ranks if schedule.consumer(r, p) is None) for p in chunks]
        self.turns_down = [_only(r for r in ranks if (schedule.producer(r, p) or (None,))[0] == r) for p in chunks]
        self.turns_up = [_only(r for r in ranks if (schedule.consumer(r, p) or (None,))[0] == r) for p in chunks]

    def run(self) -> Sums:
        """All ticks."""
        rings, sums = self._start()
        branches = [self._branch(name) for name in self.table.actions]
        columns = {name: jnp.asarray(column)[:, self.index] for name, column in columns_of_ranks(self.table).items()}
        columns |= {name: jnp.asarray(column) for name, column in columns_of_all(self.table).items()}
        (_, sums), _ = lax.scan(lambda carry, row: (self._tick(branches, *carry, row), None), (rings, sums), columns)
        return sums

    def _start(self) -> tuple[Rings, Sums]:
        """Empty rings and sums."""
        table, batch = self.table, self._microbatch(0)
        x_BSD = self.decoder.embed(self.shared, batch["tokens"][:, :-1])
        forward = [jax.eval_shape(lambda x, p=p: self._forward(p, x, batch), x_BSD) for p in range(len(self.stages))]
        float32 = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)  # noqa: E731
        _, (terms, fill) = jax.eval_shape(self._output_loss, self.shared, x_BSD, batch)
        layers = tuple(tuple(Weights(layer.weights.small, layer.program.shapes) for layer in stage.layers) for stage in self.stages)
        stats = tuple(tuple(s[:2] for s in found) for _, found, _ in forward)
        sums = float32(Sums(layers, self.shared, fill, terms, fill, stats))

        def ring(slots, like):
            return empty(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((slots, *leaf.shape), leaf.dtype), like))

        def stash(p, kept):
            *_, stash = self._backward("I", p, self._kept.places(p, Place(kept, jnp.int32(0))), x_BSD, batch, sums)
            return stash

        self._kept = Pool(self.stages, [kept for *_, kept in forward])
        kept, halves = ring(table.residual_slots, self._kept.like), self.stages if table.stash_slots else ()
        self._stash = Pool(halves, [jax.eval_shape(functools.partial(stash, p), kept) for p in range(len(halves))])
        rings = Rings(
            forward=ring(sum(table.forward_slots) + 1, x_BSD),
            backward=ring(sum(table.backward_slots) + 1, x_BSD),
            kept=kept,
            stash=ring(table.stash_slots, self._stash.like),
        )
        return rings, sums

    def _tick(self, branches, rings: Rings, sums: Sums, row: dict) -> tuple[Rings, Sums]:
        f_batch, b_batch = self._microbatch(row["f_microbatch"]), self._microbatch(row["b_microbatch"])
        x_BSD = jnp.where(row["f_first"], self.decoder.embed(self.shared, f_batch["tokens"][:, :-1]), _read(rings.forward, row["f_input"]))
        kept, stash = Place(rings.kept, row["b_residual"]), Place(rings.stash, row["w_stash"])
        reads = Reads(x_BSD, _read(rings.backward, row["b_input"]), kept, stash, f_batch, b_batch)
        with jax.named_scope("action"):  # scopes by which profiles tell what a rank spends its time on
            writes, sums = lax.switch(row["action"], branches, reads, sums)
        of_loss = []
        for p, last in enumerate(self.last):
            with jax.named_scope("output_loss"):
                dy_BSD, sums = (None, sums) if last is None else self._loss(p, row["loss_microbatch"][p], writes.y_BSD, sums)
            of_loss.append(dy_BSD)

        forward, backward = rings.forward, rings.backward
        with jax.named_scope("neighbours"):
            exchanged = self._exchange(row["sends"], writes, of_loss)
        for p, (arrived, cotangent) in enumerate(exchanged):
            forward = _write(forward, row["keep_forward"][p], arrived)
            backward = _write(backward, row["keep_backward"][p], cotangent)
        kept = self._kept.write(rings.kept, row["f_residual"], self.table.residual_slots, writes.kept)
        stash = self._stash.write(rings.stash, row["b_stash"], self.table.stash_slots, writes.stash)
        return Rings(forward, backward, kept, stash), sums

    def _exchange(self, sends: jax.Array, writes: Writes, of_loss: list[jax.Array | None]) -> list[tuple[jax.Array, jax.Array]]:
        """For each chunk the input of its forward and the cotangent of its output that come from where the schedule says. sends: whether
        any rank sends in this tick. of_loss: for each chunk the cotangent from the output loss."""
        y, dx = writes.y_BSD, writes.dx_BSD
        ranks = self.table.schedule.num_ranks
        down, up = [(r, r + 1) for r in range(ranks - 1)], [(r + 1, r) for r in range(ranks - 1)]

        # The ways of y and dx to each chunk. On two ranks the neighbour above is the one below: what arrives is for either chunk.
        ways = [(down, up), (up, down)][: len(self.stages)]
        ways = [(down + up, down + up)] if ranks == len(ways) == 2 else ways
        send = lambda y, dx: [(lax.ppermute(y, "pipe", of_y), lax.ppermute(dx, "pipe", of_dx)) for of_y, of_dx in ways]  # noqa: E731
        nothing = lambda y, dx: [(empty(y), empty(dx)) for _ in ways]  # noqa: E731
        arrived = lax.cond(sends, send, nothing, y, dx)

        def own(rank, value, otherwise):
            return otherwise if rank is None else jnp.where(self.index == rank, value, otherwise)

        return [
            (own(self.turns_down[p], y, x), own(self.last[p], of_loss[p], own(self.turns_up[p], dx, cotangent)))
            for p, (x, cotangent) in zip(range(len(self.stages)), arrived * 2)
        ]

    # Actions.

    def _branch(self, name: str):
        """The function of (reads, sums) of an action: its letters, each with the chunk it is for."""
        parts = [] if name == "idle" else [(name[i], int(name[i + 1])) for i in range(0, len(name), 2)]

        def run(reads: Reads, sums: Sums) -> tuple[Writes, Sums]:
            y_BSD = dx_BSD = empty(reads.x_BSD)
            kept, stash = empty(self._kept.like), empty(self._stash.like)
            for letter, p in parts:
                with jax.named_scope(f"{letter}{p}"):
                    if letter == "F":
                        y_BSD, stats, left = self._forward(p, reads.x_BSD, reads.f_batch)
                        kept, sums = self._kept.pooled(p, left), self._add_stats(p, sums, stats)
                    elif letter == "W":
                        layers = self.stages[p].backward_weights(self._stash.places(p, reads.stash), sums.layers[p])
                        sums = sums._replace(layers=_put(sums.layers, p, layers))
                    else:
                        places = self._kept.places(p, reads.kept)
                        dx_BSD, sums, *left = self._backward(letter, p, places, reads.dy_BSD, reads.b_batch, sums)
                        stash = self._stash.pooled(p, *left) if left else stash
            return Writes(y_BSD, dx_BSD, kept, stash), sums

        return run

    def _forward(self, p: int, x_BSD: jax.Array, batch: dict) -> tuple[jax.Array, tuple[RouterStats, ...], tuple[Kept, ...]]:
        return self.stages[p].forward(x_BSD, self._positions(batch))

    def _add_stats(self, p: int, sums: Sums, stats: tuple[RouterStats, ...]) -> Sums:
        of_chunk = tuple(_add(total, found[:2]) for total, found in zip(sums.stats[p], stats, strict=True))
        return sums._replace(
            stats=_put(sums.stats, p, of_chunk),
            loss=sums.loss + self.objective.balance_weight * sum(found.balance_loss for found in stats),
            fill=jnp.max(jnp.stack([sums.fill, *(found.fill for found in stats)])),
        )

    def _backward(self, letter: str, p: int, kept: tuple[Place, ...], dy_BSD: jax.Array, batch: dict, sums: Sums):
        """(the gradient of a stage's input, sums plus those of the weights and of the embedding), and for "I" the stash, without the
        gradients that are made of it."""
        run = self.stages[p].backward_input if letter == "I" else self.stages[p].backward
        dx_BSD, layers, *stash = run(kept, self._positions(batch), dy_BSD, self.objective.balance_weight, sums.layers[p])
        sums = sums._replace(layers=_put(sums.layers, p, layers))
        if self.first[p] is not None:
            tokens_BS, embed = batch["tokens"][:, :-1], sums.shared["embed"]
            nowhere = jnp.where(self.index == self.first[p], tokens_BS, len(embed))
            embed = embed.at[nowhere].add(dx_BSD.astype(embed.dtype), mode="drop")
            sums = sums._replace(shared={**sums.shared, "embed": embed})
        return dx_BSD, sums, *stash

    def _loss(self, p: int, microbatch: jax.Array, y_BSD: jax.Array, sums: Sums) -> tuple[jax.Array, Sums]:
        """The output loss of what the last stage of chunk p has just made of a microbatch (NONE: zeros), and its cotangent there.

        A rank takes its part of the rows. Where these do not divide, it takes all of them, and of the heads its part of the tokens.
        """
        ranks, rows = self.table.schedule.num_ranks, len(y_BSD)
        divide = rows % ranks == 0

        def run(microbatch, y_BSD, sums):
            batch = self._microbatch(microbatch)
            if divide:
                part = rows // ranks
                of_ranks = lax.all_to_all(y_BSD, "pipe", 0, 0, tiled=True)
                y_BSD = of_ranks[self.last[p] * part : (self.last[p] + 1) * part]
                batch = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, self.index * part, part), batch)
            else:
                y_BSD = lax.psum(jnp.where(self.index == self.last[p], y_BSD, 0), "pipe")
            of_loss = jax.value_and_grad(self._output_loss, argnums=(0, 1), has_aux=True)
            (loss, (terms, fill)), (d_shared, dy_BSD) = of_loss(self.shared, y_BSD, batch, None if divide else "pipe")
            if divide:
                dy_BSD = lax.all_gather(dy_BSD, "pipe", tiled=True)
            else:
                loss, terms, d_shared = jax.tree.map(lambda x: x / ranks, (loss, terms, d_shared))
            totals = _add(sums[0], (loss, terms, d_shared)), jnp.maximum(sums[1], fill)
            return dy_BSD, totals

        skip = lambda microbatch, y_BSD, sums: (empty(y_BSD), sums)  # noqa: E731
        changed = (sums.loss, sums.terms, sums.shared), sums.fill  # what goes through unchanged might be copied
        dy_BSD, ((loss, terms, shared), fill) = lax.cond(microbatch != NONE, run, skip, microbatch, y_BSD, changed)
        return dy_BSD, sums._replace(loss=loss, terms=terms, shared=shared, fill=fill)

    def _output_loss(self, shared, hidden_BSD, batch, axis=None):
        return self.objective.output_loss(attach(shared, self.objective.forms), hidden_BSD, batch, self.objective.arguments, axis)

    # Batches.

    def _microbatch(self, index) -> dict:
        return {name: _read(leaf, index) for name, leaf in self.microbatches.items()}

    def _positions(self, batch: dict):
        where = (batch[name][:, :-1] if name in batch else None for name in ("positions", "segment_ids"))
        return self.decoder.positions(batch["tokens"][:, :-1], *where)


def _only(ranks) -> int | None:
    return next(iter(ranks), None)


def _read(ring: Any, slot: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, slot, keepdims=False), ring)


def _write(ring: Any, slot: jax.Array, value: Any) -> Any:
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, slot, 0), ring, value)


def _write_if_any(ring: Any, slot: jax.Array, slots: int, value: Any) -> Any:
    """`_write`, or nothing where the slot is not one of so many: a loop, which works in place, where a conditional would copy the ring."""
    return lax.fori_loop(0, (slot < slots).astype(jnp.int32), lambda _, ring: _write(ring, slot, value), ring)


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)


def _put(items: tuple, index: int, item: Any) -> tuple:
    return (*items[:index], item, *items[index + 1 :])
