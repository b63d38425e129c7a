"""What a run would be, by shapes alone: nothing is allocated, so it tells about 671B parameters on a laptop."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.training import router_bias, schedules


def parameters(config: ModelConfig) -> dict[str, int]:
    """How many parameters: "main" (the model without its MTP module), "mtp" (the module's own), "activated" (main, by one token)."""
    shapes = Decoder(config).abstract_params()
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    mtp = size(shapes.get("mtp", {}))
    routed = size(shapes["moe_layers"]["mlp"]["experts"]) if config.num_moe_layers else 0
    idle = routed * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return {"main": size(shapes) - mtp, "mtp": mtp, "activated": size(shapes) - mtp - idle}


def report(config: TrainConfig, num_devices: int) -> str:
    """Parameters, bytes a device by kind, and tokens a step, as text. Raises UserError where the mesh does not match."""
    mesh = meshes.resolve(config.mesh, num_devices)
    counts = parameters(config.model)
    shapes = Decoder(config.model).abstract_params()
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(router_bias.split(shapes)[0]))
    kinds = {
        "parameters (float32 masters)": 4 * total,
        "gradients (float32)": 4 * trained,
        f"moments ({config.optimizer.moment_dtype}, two)": 2 * np.dtype(jnp.dtype(config.optimizer.moment_dtype)).itemsize * trained,
    }
    if config.optimizer.ema_decay is not None:
        kinds["moving average (float32)"] = 4 * total
    first, tokens = schedules.batch_size(config, 0), config.sequence_length
    lines = [
        f"parameters: {counts['main']:,} main, {counts['mtp']:,} MTP only; {counts['activated']:,} activated by a token",
        f"mesh: {', '.join(f'{axis}={size}' for axis, size in mesh.items())} ({num_devices} devices)",
        "bytes a device, activations not counted:",
        *(f"  {kind:<32} {count:>20,}" for kind, count in kinds.items()),
        f"  {'together':<32} {sum(kinds.values()):>20,}",
        f"tokens a step: {config.batch_size * tokens:,}"
        + (f", rising from {first * tokens:,}" if first != config.batch_size else "")
        + f"; {schedules.total_tokens(config):,.0f} in {config.steps:,} steps",
    ]
    return "\n".join(lines)
