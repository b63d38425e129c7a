"""What a run would be, by shapes alone: nothing is allocated, so it tells about 671B parameters on a laptop."""

import math

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel import sharding
from dsv3_jax.training import router_bias, schedules


def parameters(config: ModelConfig) -> dict[str, int]:
    """How many parameters: "main" (the model without its MTP module), "mtp" (the module's own), "activated" (main, by one token)."""
    shapes = Decoder(config).abstract_params()
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    mtp = size(shapes.get("mtp", {}))
    routed = size(shapes["moe_layers"]["mlp"]["experts"]) if config.num_moe_layers else 0
    idle = routed * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return {"main": size(shapes) - mtp, "mtp": mtp, "activated": size(shapes) - mtp - idle}


def bytes_a_device(config: TrainConfig, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes of each kind of array that one device of a mesh of those sizes holds in a step; activations are not counted.

    Masters and moments lie in shards (ZeRO-1, parallel/sharding.py); a step works on whole weights of its own layers and experts.
    """
    decoder = Decoder(config.model)
    axes, shapes = decoder.logical_axes(), decoder.abstract_params()

    def elements(part, spec_of):
        def one(names, leaf):
            spec = spec_of(names, leaf.shape)
            over = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
            return math.prod(leaf.shape) // math.prod(sizes[axis] for axis in over)

        return sum(jax.tree.leaves(jax.tree.map(one, part(axes), part(shapes), is_leaf=sharding.is_names)))

    def working(names, shape):  # a rank's layers are about its share of them
        return [*sharding.weight_spec(names, sizes), "pipe"] if "layers" in names else sharding.weight_spec(names, sizes)

    def kept(names, shape):
        return sharding.state_spec(names, shape, sizes)

    everything, trained = (lambda tree: tree), (lambda tree: router_bias.split(tree)[0])
    o = config.optimizer
    kinds = {"masters, float32": 4 * elements(everything, kept)}
    kinds[f"moments, two of {o.moment_dtype}"] = 2 * jnp.dtype(o.moment_dtype).itemsize * elements(trained, kept)
    if o.ema_decay is not None:
        kinds["moving average, float32"] = 4 * elements(everything, kept)
    if math.prod(sizes.values()) > 1:
        kinds["weights of a step, float32"] = 4 * elements(everything, working)
    kinds["gradients, float32"] = 4 * elements(trained, working)
    return kinds


def report(config: TrainConfig, num_devices: int) -> str:
    """Parameters, bytes a device by kind, and tokens a step, as text. Raises UserError where the mesh does not match."""
    sizes, counts = meshes.resolve(config.mesh, num_devices), parameters(config.model)
    kinds = bytes_a_device(config, sizes)
    first, length = schedules.batch_size(config, 0), config.sequence_length
    lines = [
        f"parameters: {counts['main']:,} main, {counts['mtp']:,} MTP only; {counts['activated']:,} activated by a token",
        f"mesh: {', '.join(f'{axis}={size}' for axis, size in sizes.items())} ({num_devices} devices)",
        "bytes a device, activations not counted:",
        *(f"  {kind:<28} {count:>20,}" for kind, count in kinds.items()),
        f"  {'together':<28} {sum(kinds.values()):>20,}",
        f"tokens a step: {config.batch_size * length:,}"
        + (f", rising from {first * length:,}" if first != config.batch_size else "")
        + f"; {schedules.total_tokens(config):,.0f} in {config.steps:,} steps",
    ]
    return "\n".join(lines)
