"""Runs any pipeline schedule inside one jit: loss, statistics and gradients of a batch.

    shard_map, manual over all mesh axes
      scan over the ticks of the schedule's table (schedule_table.py): one rank's part of it is rank.py
      sum gradients over the devices that share a weight

JAX differentiates single stages only, never the scan or a collective, and sums over devices come once, after the scan.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.parallel import placement, sharding
from dsv3_jax.parallel.rank import Objective, OutputLoss, Rank
from dsv3_jax.parallel.schedule import Schedule
from dsv3_jax.parallel.schedule_table import make_table
from dsv3_jax.parallel.stage import Layer, Stage, Weights
from dsv3_jax.precision import attach


class Result(NamedTuple):
    """A part is one microbatch on one device.

    loss: the mean over parts. terms: of the output loss, summed over parts. stats: RouterStats of the MoE layers, load [L, E] and
    balance_loss [L] summed over parts, fill [] the largest, of the output loss's too. gradients: of the loss, float32, canonical.
    """

    loss: jax.Array
    terms: dict
    stats: RouterStats
    gradients: dict


def value_and_grad(
    decoder: Decoder,
    params: dict,
    batch: dict,
    schedule: Schedule,
    mesh: Mesh,
    output_loss: OutputLoss,
    *,
    balance_weight: Any,
    arguments: Any = (),
) -> Result:
    """Loss and gradients of a batch; to be called inside `jax.jit`.

    params: float32 masters, canonical. batch: leaves [rows, ...]; microbatch i takes rows i, i + count, ..., so that a batch that lies
    over devices stays where it is. The loss is the mean over parts of output_loss and of balance_weight times each MoE layer's balance
    loss. decoder.exchange is called on every device, for a rank's own microbatch; `arguments` are handed to output_loss.
    Raises UserError, before anything is compiled, where layers, rows or the mesh do not fit the schedule.
    """
    chunks, sizes = placement.place(decoder.config, schedule), mesh.shape
    parts = _check(len(batch["tokens"]), schedule, mesh)
    stacks = {name: Weights.of(params[name]) for name in placement.STACKS if name in params}
    shared = {name: leaf for name, leaf in params.items() if name not in placement.STACKS}
    slots = placement.to_slots({name: weights.for_products(decoder.recipe) for name, weights in stacks.items()}, chunks)
    microbatches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, schedule.num_microbatches, *x.shape[1:]), 1, 0), batch)

    experts, replicas = sharding.mesh_axes(("expert",), sizes), sharding.mesh_axes(sharding.REPLICAS, sizes)

    def specs(tree, *lead):  # of leaves [*lead, ...], and [*lead, E, ...] of routed experts
        return _map(lambda _, routed: PartitionSpec(*lead, *[experts] * routed), tree)

    def total(tree, *axes):  # over the devices that share a weight
        return _map(lambda leaf, routed: lax.psum(leaf, (*axes, *(a for a in replicas if not (routed and a in experts)))), tree)

    def one_layer(leaf, routed):  # the shape, on one device, of a layer's part of leaf [L, ...]
        shape = list(leaf.shape[1:])
        if routed:
            shape[0] //= math.prod(sizes[axis] for axis in experts)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    shapes = {name: _map(one_layer, weights.large) for name, weights in stacks.items()}

    def on_device(slots, shared, microbatches, balance_weight, arguments):
        index = lax.axis_index("pipe")
        stages = []
        for row, weights in zip(chunks, slots):
            layers = []
            for slot, held in zip(row, weights):
                present = True if placement.NONE not in slot.layers else jnp.array(slot.layers)[index] != placement.NONE
                layers.append(Layer(decoder, slot.stack, jax.tree.map(lambda leaf: leaf[0], held), shapes[slot.stack], present))
            stages.append(Stage(tuple(layers)))
        objective = Objective(output_loss, arguments, balance_weight, parts)
        sums = Rank(decoder, make_table(schedule), index, tuple(stages), shared, microbatches, objective).run()
        every = mesh.axis_names
        of_slots = jax.tree.map(lambda leaf: leaf[None], (total(sums.layers), total(sums.stats)))
        return *lax.psum((sums.loss, sums.terms), every), lax.pmax(sums.fill, every), *of_slots, total(sums.shared, "pipe")

    of_layers = tuple(tuple(specs(stacks[slot.stack], "pipe") for slot in row) for row in chunks)
    over_ranks, repeated = PartitionSpec("pipe"), PartitionSpec()
    loss, terms, fill, layer_gradients, stats, shared_gradients = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs(slots, "pipe"), specs(shared), PartitionSpec(None, replicas), repeated, repeated),
        out_specs=(repeated, repeated, repeated, of_layers, over_ranks, specs(shared)),
        check_vma=False,
    )(slots, shared, microbatches, jnp.asarray(balance_weight, jnp.float32), arguments)

    stacked = {name: attach(*weights) for name, weights in placement.from_slots(layer_gradients, chunks).items()}
    load_LE, balance_L = placement.from_slots(stats, chunks).get("moe_layers", (None, None))
    return Result(loss, terms, RouterStats(load_LE, balance_L, fill), {**stacked, **shared_gradients})


def _map(function, tree: Any) -> Any:
    """tree.map of function(leaf, whether it is of routed experts)."""
    return jax.tree.map_with_path(lambda path, leaf: function(leaf, any(getattr(key, "key", None) == "experts" for key in path)), tree)


def _check(num_rows: int, schedule: Schedule, mesh: Mesh) -> int:
    """The number of parts of a batch."""
    if mesh.shape["pipe"] != schedule.num_ranks:
        raise UserError(f"a schedule for {schedule.num_ranks} ranks on a mesh with pipe={mesh.shape['pipe']}: they must be equal")
    devices = mesh.size // mesh.shape["pipe"]
    parts = schedule.num_microbatches * devices
    if num_rows % parts:
        raise UserError(
            f"{num_rows} rows do not split into {schedule.num_microbatches} microbatches on {devices} devices of a rank each: "
            f"use {max(1, round(num_rows / parts)) * parts}"
        )
    return parts
