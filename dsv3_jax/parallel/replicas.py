"""Experts with copies on a mesh, for serving: the exchange that shares tokens among the copies, and moves of copies between devices.

The N devices of `expert` hold S slots of a layer, S / N each in a row, and a slot holds one expert. `eplb.rebalance_experts` says which:
its phy2log [S], and its log2phy [E, X] (the slots of each expert, -1 for none), which a layer's parameters carry as `slots` beside the
experts' weights. A change of place is a change of values alone: nothing is compiled again.

Shapes: E experts, S slots, X the most copies of an expert, N devices, M moves.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import Experts, Routing
from dsv3_jax.parallel import buffers, exchange
from dsv3_jax.parallel.sharding import BATCH, mesh_axes

AXIS = "expert"
# Up to so many rows sorted by expert on a device, buffers have room for whatever comes; above, usually for this times balanced routing.
_ALWAYS = 16384
_TIGHT = 1.25


class Dropless(NamedTuple):
    """The exchange of serving (a `model.moe.Exchange`, to be used inside `shard_map`): no step is ever void.

    Steps of many tokens take buffers for nearly balanced routing, and in layers where those do not hold what comes, buffers that hold
    everything. rows: mesh axes and sizes of data x expert.
    """

    config: ModelConfig
    rows: tuple[tuple[str, int], ...]

    @classmethod
    def over(cls, config: ModelConfig, mesh: Mesh) -> "Dropless":
        return cls(config, tuple((axis, mesh.shape[axis]) for axis in mesh_axes(BATCH, mesh.shape)))

    def __call__(self, x_TD: jax.Array, routing: Routing, experts: Experts) -> tuple[jax.Array, jax.Array]:
        devices, held, (tokens, choices) = dict(self.rows)[AXIS], experts.down_proj[...].shape[0], routing.experts_TK.shape
        if (table := getattr(experts, "slots", None)) is not None:
            turn_T = jnp.arange(tokens) + lax.axis_index([axis for axis, _ in self.rows])
            routing = routing._replace(experts_TK=choose(routing.experts_TK, table[...], turn_T, held * devices))
        most = tokens, devices * tokens * min(choices, held)

        def run(room, sorted_room):
            hop = exchange.Hop((AXIS,), devices, room)
            return exchange.through([hop], sorted_room, x_TD, routing, experts, held * devices)

        (room,), sorted_room = buffers.rooms(self.config, [devices], tokens, _TIGHT)
        if most[1] <= max(_ALWAYS, sorted_room):
            return run(*most)
        fits = _fits(routing.experts_TK // held, devices, min(room, tokens), sorted_room)
        return lax.cond(fits, lambda: run(min(room, tokens), sorted_room), lambda: run(*most))


def _fits(device_TK: jax.Array, devices: int, room: int, sorted_room: int) -> jax.Array:
    """Whether those rooms are enough on every device."""
    goes_TKN = device_TK[..., None] == jnp.arange(devices)
    arriving = lax.pmax(jnp.max(jnp.sum(jnp.any(goes_TKN, axis=1), axis=0)), AXIS)
    rows = jnp.max(lax.psum(jnp.sum(goes_TKN, axis=(0, 1)), AXIS))
    return (arriving <= room) & (rows <= sorted_room)


def choose(experts_TK: jax.Array, slots_EX: jax.Array, turn_T: jax.Array, num_slots: int) -> jax.Array:
    """The slots [T, K] that tokens go to: copies take turns. Experts that are none (E) become slots that are none (num_slots)."""
    copies_E = jnp.sum(slots_EX >= 0, axis=1)
    copies_TK = copies_E.at[experts_TK].get(mode="fill", fill_value=1)
    return slots_EX.at[experts_TK, turn_T[:, None] % copies_TK].get(mode="fill", fill_value=num_slots)


class Moves(NamedTuple):
    """A change of one layer's plan in rounds, in each of which every device sends one slot to every device.

    source [M, N, N]: of round and sender, the slot (counted on the sender) for each receiver; target [M, N, N]: of round and receiver, the
    slot that takes what each sender sends, S / N for none.
    """

    source: np.ndarray
    target: np.ndarray

    @classmethod
    def between(cls, before_S: np.ndarray, after_S: np.ndarray, devices: int) -> "Moves":
        """Slots whose expert changes take it from a slot of their own device, or else from the device that has sent least."""
        held, pairs, sent = len(before_S) // devices, [], np.zeros(devices, np.int64)
        for slot in np.flatnonzero(before_S != after_S):
            sources = np.flatnonzero(before_S == after_S[slot])
            here = sources[sources // held == slot // held]
            source = here[0] if len(here) else sources[np.argmin(sent[sources // held])]
            sent[source // held] += not len(here)
            pairs.append((source, slot))
        rounds: dict[tuple[int, int], int] = {}  # how many each sender has for each receiver
        source, target = np.zeros((len(pairs), devices, devices), np.int32), np.full((len(pairs), devices, devices), held, np.int32)
        for a, b in pairs:
            sender, receiver = a // held, b // held
            number = rounds[sender, receiver] = rounds.get((sender, receiver), -1) + 1
            source[number, sender, receiver], target[number, receiver, sender] = a % held, b % held
        used = max(rounds.values(), default=-1) + 1
        return cls(source[:used], target[:used])

    def padded(self, rounds: int) -> "Moves":
        """With rounds that change nothing, so that one program serves all moves; only the first `len` of them are run."""
        more = rounds - len(self.source)
        held = np.iinfo(np.int32).max
        return Moves(
            np.pad(self.source, ((0, more), (0, 0), (0, 0))), np.pad(self.target, ((0, more), (0, 0), (0, 0)), constant_values=held)
        )


@functools.partial(jax.jit, static_argnames=("held", "mesh"), donate_argnames="weights")
def add_slots(weights: dict, held: int, mesh: Mesh) -> dict:
    """One layer's experts [E, ...] (sharded over `expert`) with `held` slots on each device, those that are added empty."""

    def here(leaf):
        return jnp.concatenate([leaf, jnp.zeros((held - leaf.shape[0], *leaf.shape[1:]), leaf.dtype)])

    spec = PartitionSpec(AXIS)
    return jax.tree.map(jax.shard_map(here, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), weights)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="weights")
def move(weights: dict, moves: Moves, rounds: jax.Array, mesh: Mesh) -> dict:
    """One layer's experts [S, ...] (sharded over `expert`) after `rounds` rounds of `moves`; what stays is not touched."""

    def here(weights, source, target, rounds):
        me = lax.axis_index(AXIS)

        def a_round(number, new):
            def one(old, new):
                arrived = lax.all_to_all(old[source[number, me]], AXIS, 0, 0, tiled=True)
                return new.at[target[number, me]].set(arrived, mode="drop")

            return jax.tree.map(one, weights, new)

        return lax.fori_loop(0, rounds, a_round, weights)

    specs = jax.tree.map(lambda _: PartitionSpec(AXIS), weights)
    whole = PartitionSpec()
    spread = jax.shard_map(here, mesh=mesh, in_specs=(specs, whole, whole, whole), out_specs=specs, check_vma=False)
    return spread(weights, *moves, rounds)
