"""Runs any pipeline schedule inside one jit: loss, statistics and gradients of a batch.

    shard_map, manual over all mesh axes
      bring the weights of a rank's layers there, from the shards of their masters (placement.py)
      scan over the ticks of the schedule's table (schedule_table.py): one rank's part of it is rank.py
      sum the gradients over the devices that share a weight, and bring them to the shards they belong to

JAX differentiates single stages only, never the scan or a collective, and sums over devices come once, after the scan.
"""

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
from dsv3_jax.parallel.spread import gather, reduce
from dsv3_jax.parallel.stage import Layer, Program, Stage, Weights
from dsv3_jax.precision import attach, detach, forms, is_counter, overflow_counters


class Result(NamedTuple):
    """A part is one microbatch on one device.

    loss: the mean over parts. terms: of the output loss, summed over parts. stats: RouterStats of the MoE layers, load [L, E] and
    balance_loss [L] summed over parts, fill [] the largest, of the output loss's too. gradients: of the loss, float32, in the structure
    of the parameters, each where its master lies. overflow: in FP8 recipes, counts as `overflow_counters` gives them.
    """

    loss: jax.Array
    terms: dict
    stats: RouterStats
    gradients: dict
    overflow: dict


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

    params: float32 masters. batch: leaves [rows, ...]; microbatch i takes rows i, i + count, ..., so that a batch that lies over devices
    stays where it is. The loss is the mean over parts of output_loss and of balance_weight times each MoE layer's balance loss.
    decoder.exchange is called on every device, for a rank's own microbatch; `arguments` are handed to output_loss.
    Raises UserError, before anything is compiled, where layers, rows or the mesh do not fit the schedule.
    """
    chunks, sizes = placement.place(decoder.config, schedule), mesh.shape
    parts = _check(len(batch["tokens"]), schedule, mesh)
    microbatches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, schedule.num_microbatches, *x.shape[1:]), 1, 0), batch)
    axes = decoder.logical_axes()
    of_leaves = lambda function: jax.tree.map(lambda names, leaf: function(names, leaf.shape), axes, params, is_leaf=sharding.is_names)  # noqa: E731
    specs = of_leaves(lambda names, shape: sharding.state_spec(names, shape, sizes))
    splits = of_leaves(lambda names, shape: sharding.splits(names, shape, sizes))
    split_stacks, split_shared = _stacks(splits), _shared(splits)

    def on_device(params, microbatches, balance_weight, arguments):
        index, recipe = lax.axis_index("pipe"), decoder.recipe
        shared = jax.tree.map(gather, _shared(params), split_shared)
        made = forms(shared, recipe)  # once a step, not once a microbatch
        shared = attach(shared, overflow_counters(shared, recipe))
        stacks = {name: weights.for_travel(recipe) for name, weights in _stacks(params).items()}
        programs, stages = {}, []
        for slots, row in zip(chunks, placement.to_rank(stacks, split_stacks, chunks, index)):
            layers = []
            for slot, weights in zip(slots, row):
                if slot.stack not in programs:
                    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), weights.large)
                    programs[slot.stack] = Program(decoder, slot.stack, shapes)
                present = True if placement.NONE not in slot.layers else jnp.array(slot.layers)[index] != placement.NONE
                layers.append(Layer(programs[slot.stack], weights.for_products(recipe), present))
            stages.append(Stage(tuple(layers)))
        objective = Objective(output_loss, made, arguments, balance_weight)
        sums = Rank(decoder, make_table(schedule), index, tuple(stages), shared, microbatches, objective).run()

        replicas = sharding.mesh_axes(sharding.BATCH, sizes)
        whole = sharding.Split(None, replicas), sharding.Split(None, ("pipe",))

        def collected(trees):
            like = {slot.stack: jax.tree.map(lambda _: whole, tree) for row in zip(chunks, trees) for slot, tree in zip(*row)}
            return placement.from_rank(trees, like, chunks)

        apart = [[detach(attach(*weights), is_counter) for weights in row] for row in sums.layers]
        d_shared, of_shared = detach(sums.shared, is_counter)
        gradients = placement.from_rank([[rest for rest, _ in row] for row in apart], splits, chunks)
        gradients |= jax.tree.map(reduce, d_shared, split_shared)
        overflow = collected([[counts for _, counts in row] for row in apart]) | lax.psum(of_shared, mesh.axis_names)
        loss, terms = lax.psum((sums.loss, sums.terms), mesh.axis_names)
        return loss, terms, collected(sums.stats), lax.pmax(sums.fill, mesh.axis_names), gradients, overflow

    repeated = PartitionSpec()
    loss, terms, stats, fill, gradients, overflow = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, PartitionSpec(None, sharding.mesh_axes(sharding.BATCH, sizes)), repeated, repeated),
        out_specs=(repeated, repeated, repeated, repeated, specs, repeated),
        check_vma=False,
    )(params, microbatches, jnp.asarray(balance_weight, jnp.float32), arguments)
    load_LE, balance_L = stats.get(
        "moe_layers", (jnp.zeros((0, decoder.config.n_routed_experts), jnp.float32), jnp.zeros((0,), jnp.float32))
    )
    # Divided here and not where they arise: a loss as small as its part of the whole would leave the range of FP8 gradients.
    gradients = jax.tree.map(lambda gradient: gradient / parts, gradients)
    return Result(loss / parts, terms, RouterStats(load_LE, balance_L, fill), gradients, overflow)


def _stacks(params: dict) -> dict[str, Weights]:
    return {name: Weights.of(leaf) for name, leaf in params.items() if name in placement.STACKS}


def _shared(params: dict) -> dict:
    return {name: leaf for name, leaf in params.items() if name not in placement.STACKS}


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
