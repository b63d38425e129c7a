"""What a run would be, by shapes alone: nothing is allocated, so it tells about 671B parameters on a laptop.

The bytes are within a tenth of what XLA assigns and GPUs have been measured to need (docs/benchmarks/several_gpus.md)."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import buffers, exchange, placement, sharding
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel.schedule_table import make_table
from dsv3_jax.parallel.stage import Program, Weights
from dsv3_jax.precision import forms, recipe
from dsv3_jax.training import loss, pipeline, router_bias, schedules

COMPUTING = "what is computed with at one time, about"


def parameters(config: ModelConfig) -> dict[str, int]:
    """How many parameters: "main" (the model without its MTP module), "mtp" (the module's own), "activated" (main, by one token)."""
    shapes = Decoder(config).abstract_params()
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    mtp = size(shapes.get("mtp", {}))
    routed = size(shapes["moe_layers"]["mlp"]["experts"]) if config.num_moe_layers else 0
    idle = routed * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return {"main": size(shapes) - mtp, "mtp": mtp, "activated": size(shapes) - mtp - idle}


def bytes_a_device(config: TrainConfig, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes of each kind of array that one device of a mesh of those sizes holds at the fullest moment of a step with first buffers.

    Masters and moments lie in shards (ZeRO-1, parallel/sharding.py); a step works on whole weights of its own layers and experts. What is
    `COMPUTING` is an estimate: XLA decides what of it exists at one time, and what is never written.
    """
    decoder = _decoder(config, sizes, config.remat)
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
    large, small = (lambda tree: Weights.of(tree).large), (lambda tree: Weights.of(tree).small)
    exact = decoder.recipe.compute_dtype == jnp.float32
    if math.prod(sizes.values()) > 1:  # what is made of whole masters at once takes their place
        kinds["weights of a step, float32"] = 4 * elements(everything if exact else small, working)
    if not exact:  # in bfloat16, or FP8 values that are read in either direction
        kinds["weights of a step, as products read them"] = 2 * elements(large, working)
    kinds["gradients, float32"] = 4 * elements(trained, working)
    return kinds | _of_layers(config, sizes, decoder)


def _decoder(config: TrainConfig, sizes: dict[str, int], remat: str) -> Decoder:
    size = buffers.start(config.model, meshes.num_expert_parts(sizes))
    numerics = recipe("bf16" if config.precision == "auto" else config.precision)
    return Decoder(config.model, numerics, remat=remat, exchange=exchange.over_mesh(config.model, sizes, size))


class _Layer(NamedTuple):
    """Bytes of a layer: of its weights as products read them, of its masters; of what it keeps for its backward, of what that makes again,
    of the operands of its weight gradients."""

    weights: int
    masters: int
    kept: int
    again: int
    stash: int


def _layer(config: TrainConfig, sizes: dict[str, int], decoder: Decoder, stack: str) -> _Layer:
    """On one device, for one microbatch."""
    held = config.model.n_routed_experts // meshes.num_expert_parts(sizes)
    x_BSD = _input(config, sizes, decoder)
    where = jax.eval_shape(decoder.positions, jax.ShapeDtypeStruct(x_BSD.shape[:2], jnp.int32))
    mesh, whole = AbstractMesh(tuple(sizes.values()), tuple(sizes)), PartitionSpec()

    def one(path, leaf):
        shape = (held, *leaf.shape[2:]) if any(key.key == "experts" for key in path) else leaf.shape[1:]
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    layer = jax.tree.map_with_path(one, decoder.abstract_params()[stack])
    masters = Weights.of(layer)
    weights = jax.eval_shape(lambda w: w.for_products(decoder.recipe), masters)

    def kept(decoder):
        program = Program(decoder, stack, masters.large)
        on_device = jax.shard_map(program.forward, mesh=mesh, in_specs=(whole,) * 4, out_specs=whole, check_vma=False)
        return program, _bytes(jax.eval_shape(on_device, *weights, x_BSD, where)[2])

    program, count = kept(decoder)
    _, everything = kept(_decoder(config, sizes, "none"))
    stash = jax.eval_shape(functools.partial(program.zero_taps, math.prod(x_BSD.shape[:2])))
    return _Layer(_bytes(weights), _bytes(layer), count, max(0, everything - count), _bytes(stash))


def _input(config: TrainConfig, sizes: dict[str, int], decoder: Decoder) -> jax.ShapeDtypeStruct:
    """A layer's input [B, S, D]: a microbatch on one device."""
    devices = sizes["data"] * meshes.num_expert_parts(sizes)
    microbatch = config.microbatch_size or (devices if sizes["pipe"] > 1 else config.batch_size)
    shape = max(1, microbatch // devices), config.sequence_length, config.model.hidden_size
    return jax.ShapeDtypeStruct(shape, decoder.recipe.compute_dtype)


def _of_layers(config: TrainConfig, sizes: dict[str, int], decoder: Decoder) -> dict[str, int]:
    """What a device keeps of a microbatch, the MTP module as one more layer, and computes with at the beginning of its backward."""
    model = config.model
    counts = {"dense_layers": model.first_k_dense_replace, "moe_layers": model.num_moe_layers}
    layers = {stack: _layer(config, sizes, decoder, stack) for stack, count in counts.items() if count}
    *_, last = layers.values()
    kept = sum(counts[stack] * layer.kept for stack, layer in layers.items()) + model.num_nextn_predict_layers * last.kept
    return {
        "activations kept for the backward": kept,
        COMPUTING: max(_logits(config, _input(config, sizes, decoder), decoder), *(layer.again + layer.stash for layer in layers.values())),
    }


def _logits(config: TrainConfig, x_BSD: jax.ShapeDtypeStruct, decoder: Decoder) -> int:
    """Of as many as exist at one time, float32, and their gradient."""
    entries = min(math.prod(x_BSD.shape[:2]) * config.model.vocab_size, loss.LOGITS_AT_ONCE)
    return entries * (4 + jnp.dtype(decoder.recipe.compute_dtype).itemsize)


def _of_pipeline(config: TrainConfig, sizes: dict[str, int], decoder: Decoder) -> dict[str, int]:
    """What a rank of a pipeline holds in a step (parallel/executor.py): for each of its slots a layer, for each place in a ring a value."""
    plan = pipeline.schedule(config, sizes, config.batch_size)
    table, chunks = make_table(plan), placement.place(config.model, plan)
    parts, shapes, x_BSD = meshes.num_expert_parts(sizes), decoder.abstract_params(), _input(config, sizes, decoder)
    stacks = sorted({slot.stack for slots in chunks for slot in slots})
    layers = {stack: _layer(config, sizes, decoder, stack) for stack in stacks}

    def of_chunk(slots, name):
        return sum(getattr(layers[slot.stack], name) for slot in slots)

    def pooled(name):  # both chunks share a ring
        return sum(max([slot.stack for slot in slots].count(stack) for slots in chunks) * getattr(layers[stack], name) for stack in stacks)

    def operands(letter, slots):
        """Of weight gradients, at one time: a layer that not all ranks have makes its own where it makes them, but for those that wait."""
        alone = [layers[slot.stack].stash for slot in slots if placement.NONE in slot.layers and letter != "I"]
        return of_chunk(slots, "stash") - sum(alone) + max(alone, default=0)

    def of_action(name):
        """What its forward keeps, what one layer of its backward makes again, operands of its weight gradients."""
        run = {letter: chunks[int(name[name.index(letter) + 1])] for letter in "FBIW" if letter in name}
        kept = of_chunk(run.pop("F", ()), "kept")
        return kept + sum(operands(letter, slots) + max(layers[slot.stack].again for slot in slots) for letter, slots in run.items())

    def on_device(outside):
        experts = outside.get("mtp", {}).get("layer", {}).get("mlp", {}).get("experts", {})
        return _bytes(outside) - _bytes(experts) + _bytes(experts) // parts

    outside = {name: leaf for name, leaf in shapes.items() if name not in placement.STACKS}
    shared, made = on_device(outside), on_device(jax.eval_shape(lambda outside: forms(outside, decoder.recipe), outside))
    # The output loss's own gradients, and the MTP module; each rank has its part of the rows where they divide.
    last, part = layers[stacks[-1]], 1 if x_BSD.shape[0] % sizes["pipe"] else sizes["pipe"]
    mtp = config.model.num_nextn_predict_layers * (last.kept + last.again + last.stash) // part
    of_loss = shared + mtp + _logits(config, x_BSD, decoder) // sizes["pipe"]
    return {
        "weights of a step, as products read them": sum(of_chunk(slots, "weights") for slots in chunks) + shared + made,
        "gradients, float32": sum(of_chunk(slots, "masters") for slots in chunks) + shared,
        "activations kept for the backward": pooled("kept") * table.residual_slots,
        "outputs and gradients that wait": (sum(table.forward_slots) + sum(table.backward_slots) + 2) * _bytes(x_BSD),
        "operands of weight gradients that wait": pooled("stash") * table.stash_slots,
        COMPUTING: max(of_loss, *(of_action(name) for name in table.actions)),
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
        f"mesh: {', '.join(f'{axis}={size}' for axis, size in sizes.items())} ({num_devices} device{'s' if num_devices > 1 else ''})",
        "bytes a device at the fullest moment of a step:",
        *(f"  {kind:<44} {count:>20,}" for kind, count in kinds.items()),
        f"  {'together':<44} {sum(kinds.values()):>20,}",
        f"tokens a step: {config.batch_size * length:,}"
        + (f", rising from {first * length:,}" if first != config.batch_size else "")
        + f"; {schedules.total_tokens(config):,.0f} in {config.steps:,} steps",
    ]
    return "\n".join(lines)
