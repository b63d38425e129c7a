"""Which layers a pipeline rank holds, and the way between canonical parameters [L, ...], in shards, and what the ranks hold.

The layers are dealt out in order so that ranks have equally much to do at the same time. All ranks run one program, so a chunk is a row of
slots that are the same everywhere: first slots for dense layers, then slots for MoE layers, as many as any rank needs. A slot that a rank
has no layer for passes its input on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.schedule import Schedule, parts, simulate
from dsv3_jax.parallel.spread import gather, reduce

NONE = -1
STACKS = ("dense_layers", "moe_layers")


class Slot(NamedTuple):
    """A place for a layer in a chunk. stack: of the parameter dict; layers: for each rank an index in that stack, or NONE."""

    stack: str
    layers: tuple[int, ...]


Chunks = tuple[tuple[Slot, ...], ...]


def place(config: ModelConfig, schedule: Schedule) -> Chunks:
    """The slots of each chunk. Raises UserError where there are fewer layers than stages."""
    layers, stages = config.num_hidden_layers, schedule.num_stages
    per_rank = stages // schedule.num_ranks
    if layers < stages:
        fits = layers // per_rank
        fits -= fits % 2 if schedule.kind == "dualpipe" else 0
        raise UserError(
            f"{schedule.kind} on pipe={schedule.num_ranks} has {stages} stages and the model only {layers} layers: "
            + (f"use pipe={fits} or less" if fits else "use a schedule with one chunk of layers on a rank, such as zb1p")
        )
    ends = np.cumsum(_layers_of_stages(layers, schedule))

    def held(rank, p, stack):
        end = ends[stage := schedule.stage(rank, p)]
        held = range(ends[stage - 1] if stage else 0, end)
        dense = config.first_k_dense_replace
        return [i for i in held if i < dense] if stack == "dense_layers" else [i - dense for i in held if i >= dense]

    chunks = []
    for p in range(schedule.num_chunks):
        slots = []
        for stack in STACKS:
            layers_of = [held(rank, p, stack) for rank in range(schedule.num_ranks)]
            for j in range(max(map(len, layers_of))):
                slots.append(Slot(stack, tuple(int(layers[j]) if j < len(layers) else NONE for layers in layers_of)))
        chunks.append(tuple(slots))
    return tuple(chunks)


def _layers_of_stages(num_layers: int, schedule: Schedule) -> list[int]:
    """How many layers each stage has: one, and each further layer goes to where it makes a step in lockstep longest by least."""
    work, counts = _work(schedule), np.ones(schedule.num_stages, int)
    for _ in range(num_layers - len(counts)):
        added = counts + np.eye(len(counts), dtype=int)
        seconds = [np.max(work @ option, axis=1).sum() for option in added]
        counts = added[min(range(len(counts)), key=lambda stage: (seconds[stage], counts[stage], stage))]
    return counts.tolist()


def _work(schedule: Schedule) -> np.ndarray:
    """[ticks, ranks, stages]: passes through the layers of a stage that a rank does in a tick. The gradients of inputs and of weights take
    as long as a forward each; the output loss is work of all ranks alike."""
    costs = {"F": 1, "I": 1, "W": 1, "B": 2}
    lockstep = simulate(schedule, dict.fromkeys((*costs, "FB"), 1))
    work = np.zeros((lockstep.makespan, schedule.num_ranks, schedule.num_stages))
    for rank, (actions, ticks) in enumerate(zip(schedule.actions, lockstep.starts)):
        for action, tick in zip(actions, ticks):
            for name, p, _ in parts(action):
                work[tick, rank, schedule.stage(rank, p)] += costs[name]
    return work


def to_rank(stacks: dict, splits: dict, chunks: Chunks, rank: jax.Array) -> tuple[tuple[Any, ...], ...]:
    """This rank's whole weights, for each slot of each chunk, from the shards of the canonical ones; inside `shard_map`.

    stacks: by name trees with leaves [L, ...], as `sharding.splits` splits them; splits: these, in the same structure. A rank without a
    layer for a slot holds another layer's values there; dualpipe's second chunk is a copy of other ranks' first.
    """

    def move(slot, shard, splits):
        over_replicas, over_pipe = splits
        of_ranks = jnp.take(shard, np.maximum(slot.layers, 0), axis=0)
        if over_pipe.dimension is None:
            mine = lax.dynamic_slice_in_dim(of_ranks, rank, 1)
        else:
            mine = lax.all_to_all(of_ranks, "pipe", 0, over_pipe.dimension, tiled=True)
        return gather(mine, [over_replicas])[0]

    def fill(slot):
        return jax.tree.map(lambda *leaf: move(slot, *leaf), stacks[slot.stack], splits[slot.stack])

    return tuple(tuple(map(fill, slots)) for slots in chunks)


def from_rank(trees: tuple[tuple[Any, ...], ...], splits: dict, chunks: Chunks) -> dict:
    """The transpose of `to_rank`: sums over the devices that share a weight, copies of a layer among them, each keeps its shard.

    Stacks that have no slots are left out.
    """

    def move(gradient, splits):  # to leaves [ranks, ...]
        over_replicas, over_pipe = splits
        mine = reduce(gradient[None], [over_replicas])
        if over_pipe.dimension is None:
            return lax.all_gather(mine, "pipe", tiled=True)
        return lax.all_to_all(mine, "pipe", over_pipe.dimension, 0, tiled=True)

    stacks = {}
    for stack in STACKS:
        members = [(slot, tree) for slots, row in zip(chunks, trees) for slot, tree in zip(slots, row) if slot.stack == stack]
        if not members:
            continue
        places: dict[int, list[int]] = {}  # layer -> where it is among the ranks of all slots
        for place, layer in enumerate(layer for slot, _ in members for layer in slot.layers):
            places.setdefault(layer, []).append(place)
        places.pop(NONE, None)
        copies = np.array([places[layer] for layer in range(len(places))]).T

        def order(*leaves, copies=copies):
            joined = jnp.concatenate(leaves)
            return sum(jnp.take(joined, copy, axis=0) for copy in copies)

        stacks[stack] = jax.tree.map(order, *[jax.tree.map(move, tree, splits[stack]) for _, tree in members])
    return stacks
