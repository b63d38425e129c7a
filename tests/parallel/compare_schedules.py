"""Loss, statistics and gradients of pipelines and of one device, on a small model of everything (dense and MoE layers, MTP, balance loss).

    python tests/parallel/compare_schedules.py float64 dualpipev:pipe=2,expert=2 zb1p:pipe=2 ...    prints a JSON line for each

{"case": ..., "loss": the largest relative difference of the loss and its terms, "layers": that of any gradient of the layers, "others": of
the other parameters' (embedding, norm, head, MTP), "load": the largest difference of an expert's tokens}

KIND@N puts off the weight gradients of N microbatches at most, KIND/REMAT keeps what that says (norms_and_up otherwise). With `bf16` and
`fp8_reference` the comparison is with a pipeline of one rank on the same other axes and microbatches: over `expert` sums are rounded once
more, and tiles of tokens do not reach across devices.
"""

import functools
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# A deadlock ends the process instead of hanging it; the rest makes compilation fast.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=120 --xla_backend_optimization_level=0"
    " --xla_allow_excess_precision=false"  # bfloat16 is rounded wherever the program says so, in every program alike
)

import jax
import jax.numpy as jnp

if __name__ == "__main__" and sys.argv[1] == "float64":
    # The model asks for float32 by this name in every place where it wants to be exact: so all of it computes in float64.
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import Decoder
from dsv3_jax.model.moe import exchange_locally
from dsv3_jax.parallel import exchange, placement, schedule
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.precision import attach, forms, recipe
from dsv3_jax.training import loss
from dsv3_jax.training.pipeline import pipeline_value_and_grad

WEIGHTS = {"mtp_loss_weight": 0.3, "balance_loss_weight": 0.1}
ROWS, LENGTH = 16, 6


def model(layers: int, width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=40,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=24,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        first_k_dense_replace=2,
        moe_intermediate_size=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        rope_scaling=None,
        max_position_embeddings=64,
        initializer_range=0.1,
    )


def _recipe(precision: str):
    return recipe("float32" if precision == "float64" else precision)


def batch() -> dict:
    """Packed rows: parts with different numbers of targets, so that a mean of means would be wrong."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = (np.arange(LENGTH + 1) >= rng.integers(2, LENGTH, (ROWS, 1))).astype(np.int32)
    mask = rng.random((ROWS, LENGTH)) < np.linspace(0.4, 1, ROWS)[:, None]
    return {"tokens": tokens, "segment_ids": segments, "loss_mask": mask.astype(jnp.dtype(jnp.float32))}


def parameters(decoder: Decoder) -> dict:
    """Random, norms and selection biases too: as they are at first, one and zero, they would hide mistakes."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = str(path[-1].key)
        values = 0.02 * rng.standard_normal(leaf.shape) if "bias" in name else 0.1 * rng.standard_normal(leaf.shape)
        return np.asarray(values + ("norm" in name), leaf.dtype)  # a jnp.asarray of each shape would be compiled

    return jax.tree.map_with_path(draw, decoder.abstract_params())


@functools.cache
def on_one_device(precision: str, layers: int, count: int):
    decoder = Decoder(model(layers, 16), _recipe(precision))
    params = parameters(decoder)
    over = jax.tree.map(lambda n: n / count, loss.num_targets(batch()))
    # FP8 forms once a step, as in training; other weights are cast where they are used, which training does not do.
    made = jax.jit(lambda params: forms(params, decoder.recipe))(params) if decoder.recipe.fp8 else {}

    def loss_of(params, part):
        return loss.loss_and_terms(decoder, attach(params, made), part, over=over, **WEIGHTS)

    gradient_of = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    parts = [jax.device_get(gradient_of(params, {name: leaf[i::count] for name, leaf in batch().items()})) for i in range(count)]
    (total, terms), gradients = jax.tree.map(lambda *leaves: sum(leaves) / count, *parts)
    return params, (total, terms | {"load": terms["load"] * count}), gradients


def in_pipeline(precision: str, layers: int, kind: str, mesh: str, count: int, params: dict):
    sizes = meshes.parse(mesh)
    devices = int(np.prod(list(sizes.values())))
    place = meshes.make(mesh, jax.devices()[:devices])
    spread = exchange.over_mesh(model(layers, 16), sizes, 8.0) if devices > sizes["data"] * sizes["pipe"] else exchange_locally
    kind, _, remat = kind.partition("/")
    decoder = Decoder(model(layers, 16), _recipe(precision), remat=remat or "norms_and_up", exchange=spread)
    kind, _, most = kind.partition("@")
    plan = schedule.build(kind, num_ranks=sizes["pipe"], num_microbatches=count, max_delayed=int(most) if most else None)
    step = jax.jit(lambda params, batch: pipeline_value_and_grad(decoder, params, batch, plan, place, **WEIGHTS))
    return step(params, batch())


def worst(found, expected) -> float:
    """The largest difference of any leaf, relative to the largest value of that leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected))]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-300)) for a, b in pairs if b.size)


def compare(precision: str, case: str) -> dict:
    """case: KIND[@N][/REMAT]:MESH[:LAYERS]; one layer more than stages by default, so that they do not divide."""
    kind, mesh, *layers = case.split(":")
    sizes = meshes.parse(mesh)
    ranks, devices = sizes["pipe"], meshes.num_expert_parts(sizes) * sizes["data"]
    count = max(2 * ranks, ROWS // devices // 2)
    stages = ranks * (2 if kind.startswith("dualpipev") else 1)
    layers = int(layers[0]) if layers else max(stages + 1, 4)
    exact = precision.startswith("float")
    params, (total, terms), gradients = on_one_device(precision, layers, 1 if exact else count)
    if not exact and devices > 1:
        one_rank = ",".join(f"{axis}={1 if axis == 'pipe' else size}" for axis, size in sizes.items())
        total, terms, gradients = jax.device_get(in_pipeline(precision, layers, "1f1b", one_rank, count, params))
    found_total, found_terms, found = in_pipeline(precision, layers, kind, mesh, count, params)
    others = lambda terms: {name: leaf for name, leaf in terms.items() if name not in ("load", "fill", "overflow")}  # noqa: E731
    return {
        "case": case,
        "loss": worst((found_total, others(found_terms)), (total, others(terms))),
        "layers": worst(*({name: tree[name] for name in placement.STACKS} for tree in (found, gradients))),
        "others": worst(*({name: leaf for name, leaf in tree.items() if name not in placement.STACKS} for tree in (found, gradients))),
        "load": float(np.max(np.abs(np.asarray(found_terms["load"]) - np.asarray(terms["load"])))),
    }


if __name__ == "__main__":
    for case in sys.argv[2:]:
        print(json.dumps(compare(sys.argv[1], case)), flush=True)
