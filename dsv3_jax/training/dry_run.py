"""What a run would be, by shapes alone: nothing is allocated, so it tells about 671B parameters on a laptop."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import buffers, exchange, placement, sharding
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel.schedule_table import make_table
from dsv3_jax.parallel.stage import Program, Weights
from dsv3_jax.precision import recipe
from dsv3_jax.training import pipeline, router_bias, schedules


def parameters(config: ModelConfig) -> dict[str, int]:
    """How many parameters: "main" (the model without its MTP module), "mtp" (the module's own), "activated" (main, by one token)."""
    shapes = Decoder(config).abstract_params()
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    mtp = size(shapes.get("mtp", {}))
    routed = size(shapes["moe_layers"]["mlp"]["experts"]) if config.num_moe_layers else 0
    idle = routed * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return {"main": size(shapes) - mtp, "mtp": mtp, "activated": size(shapes) - mtp - idle}


def bytes_a_device(config: TrainConfig, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes of each kind of array that one device of a mesh of those sizes holds in a step with first buffers; of activations only those
    that a pipeline keeps from tick to tick.

    Masters and moments lie in shards (ZeRO-1, parallel/sharding.py); a step works on whole weights of its own layers and experts.
    """
    numerics = recipe("bf16" if config.precision == "auto" else config.precision)
    size = buffers.start(config.model, meshes.num_expert_parts(sizes))
    decoder = Decoder(config.model, numerics, remat=config.remat, exchange=exchange.over_mesh(config.model, sizes, size))
    axes, shapes = decoder.logical_axes(), decoder.abstract_params()

    def elements(part, spec_of):
        def one(names, leaf):
            over = [axis for entry in spec_of(names, leaf.shape) if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
            return math.prod(leaf.shape) // math.prod(sizes[axis] for axis in over)

        return sum(jax.tree.leaves(jax.tree.map(one, part(axes), part(shapes), is_leaf=sharding.is_names)))

    def working(names, shape):
        return sharding.weight_spec(names, sizes)

    def kept(names, shape):
        return sharding.state_spec(names, shape, sizes)

    everything, trained = (lambda tree: tree), (lambda tree: router_bias.split(tree)[0])
    o = config.optimizer
    kinds = {"masters, float32": 4 * elements(everything, kept)}
    kinds[f"moments, two of {o.moment_dtype}"] = 2 * jnp.dtype(o.moment_dtype).itemsize * elements(trained, kept)
    if o.ema_decay is not None:
        kinds["moving average, float32"] = 4 * elements(everything, kept)
    if sizes["pipe"] > 1:
        return kinds | _of_pipeline(config, sizes, decoder)
    if math.prod(sizes.values()) > 1:
        kinds["weights of a step, float32"] = 4 * elements(everything, working)
    kinds["gradients, float32"] = 4 * elements(trained, working)
    return kinds


def _of_pipeline(config: TrainConfig, sizes: dict[str, int], decoder: Decoder) -> dict[str, int]:
    """What a rank of a pipeline holds in a step (parallel/executor.py): for each of its slots a layer, for each place in a ring a value."""
    plan = pipeline.schedule(config, sizes, config.batch_size)
    table, chunks = make_table(plan), placement.place(config.model, plan)
    parts = meshes.num_expert_parts(sizes)
    held = config.model.n_routed_experts // parts
    rows = (config.microbatch_size or 0) // (sizes["data"] * parts) or 1
    x_BSD = jax.ShapeDtypeStruct((rows, config.sequence_length, config.model.hidden_size), decoder.recipe.compute_dtype)
    where = jax.eval_shape(decoder.positions, jax.ShapeDtypeStruct(x_BSD.shape[:2], jnp.int32))
    shapes, mesh = decoder.abstract_params(), AbstractMesh(tuple(sizes.values()), tuple(sizes))

    def of_layer(stack):
        """Bytes of a layer: its weights as products read them, as masters, what it keeps for its backward, for its weight gradients."""

        def one(path, leaf):
            shape = (held, *leaf.shape[2:]) if any(key.key == "experts" for key in path) else leaf.shape[1:]
            return jax.ShapeDtypeStruct(shape, leaf.dtype)

        layer = jax.tree.map_with_path(one, shapes[stack])
        masters = Weights.of(layer)
        program = Program(decoder, stack, masters.large)
        weights = jax.eval_shape(lambda w: w.for_products(decoder.recipe), masters)
        whole = PartitionSpec()
        on_device = jax.shard_map(program.forward, mesh=mesh, in_specs=(whole,) * 4, out_specs=whole, check_vma=False)
        _, _, kept = jax.eval_shape(on_device, *weights, x_BSD, where)
        stash = jax.eval_shape(functools.partial(program.zero_taps, rows * config.sequence_length))
        return [_bytes(tree) for tree in (weights, layer, kept, stash)]

    in_chunks = {
        slot.stack: max([slot.stack for slot in slots].count(slot.stack) for slots in chunks) for slots in chunks for slot in slots
    }
    of_stacks = {stack: of_layer(stack) for stack in in_chunks}
    weights, gradients = (sum(of_stacks[slot.stack][i] for slots in chunks for slot in slots) for i in (0, 1))
    kept, stash = (sum(count * of_stacks[stack][i] for stack, count in in_chunks.items()) for i in (2, 3))
    outside = {name: leaf for name, leaf in shapes.items() if name not in placement.STACKS}
    experts = outside.get("mtp", {}).get("layer", {}).get("mlp", {}).get("experts", {})
    shared = _bytes(outside) - _bytes(experts) + _bytes(experts) // parts
    places = sum(table.forward_slots) + sum(table.backward_slots) + 2
    return {
        "weights of a step, as products read them": weights + shared,
        "gradients, float32": gradients + shared,
        "activations kept for the backward": kept * (table.residual_slots + 1),
        "outputs and gradients that wait": places * _bytes(x_BSD),
        "operands of weight gradients that wait": stash * (table.stash_slots + 1) if table.stash_slots else 0,
    }


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def report(config: TrainConfig, num_devices: int) -> str:
    """Parameters, bytes a device by kind, and tokens a step, as text. Raises UserError where the run would not fit the mesh."""
    sizes, counts = meshes.resolve(config.mesh, num_devices), parameters(config.model)
    pipeline.check_mesh(config, sizes)
    kinds = bytes_a_device(config, sizes)
    first, length = schedules.batch_size(config, 0), config.sequence_length
    lines = [
        f"parameters: {counts['main']:,} main, {counts['mtp']:,} MTP only; {counts['activated']:,} activated by a token",
        f"mesh: {', '.join(f'{axis}={size}' for axis, size in sizes.items())} ({num_devices} devices)",
        f"bytes a device, {'what a tick computes with' if sizes['pipe'] > 1 else 'activations'} not counted:",
        *(f"  {kind:<40} {count:>20,}" for kind, count in kinds.items()),
        f"  {'together':<40} {sum(kinds.values()):>20,}",
        f"tokens a step: {config.batch_size * length:,}"
        + (f", rising from {first * length:,}" if first != config.batch_size else "")
        + f"; {schedules.total_tokens(config):,.0f} in {config.steps:,} steps",
    ]
    return "\n".join(lines)
