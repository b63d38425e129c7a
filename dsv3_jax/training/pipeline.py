"""The loss of training/loss.py and its gradients, computed by a pipeline (parallel/executor.py)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import TrainConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import executor, placement
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel.mesh import num_expert_parts
from dsv3_jax.parallel.schedule import Schedule, build
from dsv3_jax.training import loss


def check_mesh(config: TrainConfig, sizes: Mapping[str, int]) -> None:
    """Raises UserError where the experts, the layers or the batch of a run do not divide over a mesh of these sizes."""
    batches = {name: getattr(config, name) for name in ("batch_size", "batch_ramp_from", "microbatch_size")}
    meshes.check(sizes, config.model, batches)
    if sizes["pipe"] > 1:
        for num_rows in (config.batch_size, config.batch_ramp_from or config.batch_size):
            schedule(config, sizes, num_rows)


def schedule(config: TrainConfig, sizes: Mapping[str, int], num_rows: int) -> Schedule:
    """The schedule of a step of so many rows on a mesh of those sizes: microbatches of config.microbatch_size, or of a row a device.

    Raises UserError, with the nearest valid choice, where rows, layers or ranks do not fit it.
    """
    devices = sizes["data"] * num_expert_parts(sizes)
    microbatch = config.microbatch_size or devices
    try:
        count, most = num_rows // microbatch, config.pipeline_max_delayed
        made = build(config.pipeline_schedule, num_ranks=sizes["pipe"], num_microbatches=count, max_delayed=most)
    except ValueError as error:
        raise UserError(f"{error} (a step of {num_rows} sequences in microbatches of {microbatch})") from None
    placement.place(config.model, made)
    return made


def pipeline_value_and_grad(
    decoder: Decoder,
    params: dict,
    batch: dict,
    schedule: Schedule,
    mesh: Mesh,
    *,
    mtp_loss_weight: Any,
    balance_loss_weight: Any,
) -> tuple[jax.Array, dict, dict]:
    """(loss, terms, gradients): what `jax.value_and_grad` of `loss.loss_and_terms` gives for the whole batch on one device.

    To be called inside `jax.jit`; arguments and errors as of `executor.value_and_grad`.
    """
    parts = schedule.num_microbatches * (mesh.size // schedule.num_ranks)
    over, rows = jax.tree.map(lambda n: n / parts, loss.num_targets(batch)), len(batch["tokens"]) // parts

    def output_loss(params, hidden_BSD, microbatch, arguments, axis):
        over, mtp_weight, balance_weight = arguments
        main, mtp, stats = loss.after_layers(decoder, params, hidden_BSD, microbatch, over, axis)
        balance, fill = jnp.sum(stats.balance_loss) * (len(hidden_BSD) / rows), jnp.sum(stats.fill)  # a mean over rows: its part
        terms = {"main": main, "mtp": mtp, "balance": balance, "load": stats.load_E}
        return main + mtp_weight * mtp + balance_weight * balance, (terms, fill)

    result = executor.value_and_grad(
        decoder,
        params,
        batch,
        schedule,
        mesh,
        output_loss,
        balance_weight=balance_loss_weight,
        arguments=jax.tree.map(jnp.asarray, (over, mtp_loss_weight, balance_loss_weight)),
    )
    layers, head = result.stats, result.terms
    terms = {
        "main": head["main"] / parts,
        "mtp": head["mtp"] / parts,
        "balance": (jnp.sum(layers.balance_loss) + head["balance"]) / parts,
        "fill": layers.fill,
        "load": jnp.concatenate([layers.load_E, head["load"]]),
        "overflow": result.overflow,
    }
    return result.loss, terms, result.gradients
