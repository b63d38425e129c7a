"""Trains a small model of everything (dense and MoE layers, MTP, balance loss, router bias) over several Hopper GPUs, and on one of them:
that no step hangs, and how far first gradients and losses are apart. Prints a JSON line for each:

    python tests/parallel/compare_on_gpus.py fp8 dualpipe:pipe=2 data=2 --steps 500
    python tests/parallel/compare_on_gpus.py bf16 dualpipev:pipe=2,expert=2 zb1p:pipe=2,expert=2 --steps 500

{"case": [KIND:]MESH, "steps": that came to their end, "ms": of one, "gradients": the norm of their difference from one GPU's after the
first step, as part of the norm of one GPU's, "worst": that of a single array, "without pipe": the first against the same mesh without
`pipe`, "loss": the largest difference of the first 6}

What rounding alone does in so many steps say the cases "data=1, rows …": one GPU again, which adds up every batch in another order. Of more
steps losses say nothing: at this rate some orders of rows meet a spike of the gradient's norm within twenty (docs/benchmarks).

Buffers of the exchange are for whatever comes, so that no step is void. Everything is compiled before anything is run, and to give the same
bits each time: one GPU's first FP8 gradient would else be 1e-3 from itself now and then (docs/benchmarks/training.md).
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.precision import recipe
from dsv3_jax.training.schedules import Scheduled
from dsv3_jax.training.step import Trainer

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=1024,
    num_hidden_layers=4,
    intermediate_size=2048,
    num_attention_heads=8,
    q_lora_rank=512,
    first_k_dense_replace=1,
    moe_intermediate_size=512,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    rope_scaling=None,
)
ROWS, MICROBATCHES, COMPARED = 8, 4, 6
REORDERED = {
    "data=1, rows reversed": [7, 6, 5, 4, 3, 2, 1, 0],
    "data=1, rows shifted": [1, 2, 3, 4, 5, 6, 7, 0],
    "data=1, every other row first": [0, 2, 4, 6, 1, 3, 5, 7],
}
SCHEDULED = Scheduled(3e-4, 0.3, 1e-3)


class Run:
    """Training of a case, compiled."""

    def __init__(self, precision: str, case: str, length: int):
        self.case = case
        kind, _, mesh = case.rpartition(":")
        sizes = meshes.parse(mesh)
        count = int(np.prod(list(sizes.values())))
        config = TrainConfig(
            model=dataclasses.replace(MODEL, max_position_embeddings=length),
            precision=precision,
            batch_size=ROWS,
            microbatch_size=ROWS // MICROBATCHES,
            sequence_length=length,
            pipeline_schedule=kind or "dualpipev",
        )
        trainer = Trainer(Decoder(config.model, recipe(precision), remat="norms"), config, meshes.make(mesh, jax.devices()[:count]))
        make = lambda key: trainer.init(trainer.spread.decoder(1.0).init(jax.random.wrap_key_data(key)))  # noqa: E731
        self.key = np.asarray(jax.random.key_data(jax.random.key(0)))  # an argument, so that every mesh draws the same parameters
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        state = jax.tree.map(place, jax.eval_shape(make, self.key), trainer.shardings)
        self.put = lambda rows: {"tokens": jax.device_put(rows, trainer.batch_sharding)}
        tokens = jax.ShapeDtypeStruct((ROWS, length + 1), np.int32, sharding=trainer.batch_sharding)
        self.init = jax.jit(make, out_shardings=trainer.shardings).lower(self.key).compile()
        size = np.inf if trainer.spread.has_buffers else 1.0
        lowered = trainer.jitted(size).lower(state, {"tokens": tokens}, SCHEDULED)
        self.step = lowered.compile({"xla_gpu_deterministic_ops": True})

    def train(self, batches: list[np.ndarray], steps: int) -> tuple[list[float], dict, float]:
        """(losses, the first gradients, ms a step after the first ones)."""
        state, losses = self.init(self.key), []
        for i in range(steps):
            state, metrics = self.step(state, self.put(batches[i % len(batches)]), SCHEDULED)
            losses.append(metrics["loss"])
            if i == 0:
                gradients = jax.device_get(state.adam.mu)
            if i == COMPARED:
                losses[i].block_until_ready()
                start = time.perf_counter()
            if i % 50 == 49:
                print(f"{self.case}: step {i + 1}, loss {float(losses[i]):.4f}", file=sys.stderr, flush=True)
        jax.block_until_ready(state)
        took = (time.perf_counter() - start) / (steps - 1 - COMPARED)
        return [float(loss) for loss in losses], gradients, took * 1e3


compiled = functools.cache(Run)  # what several calls compare with is compiled once


def prepare(precision: str, cases: list[str], steps: int, length: int = 1024):
    """Compiles all of them; the function that is returned runs them, and yields a row for each."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"  # attention reads it when it is traced

    def without_pipe(case):
        axes = [axis for axis in case.rpartition(":")[2].split(",") if not axis.startswith("pipe")]
        return ",".join(axes) or "data=1"

    with ThreadPoolExecutor() as pool:
        names = dict.fromkeys(["data=1", *map(without_pipe, cases), *cases])
        runs = dict(zip(names, pool.map(lambda name: compiled(precision, name, length), names)))
    text = np.concatenate(
        [np.frombuffer(file.read_bytes(), np.uint8) for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    )
    batches = list(np.resize(text, (32, ROWS, length + 1)).astype(np.int32))

    def measure():
        references = {}
        first, *others = names
        for name in (first, *REORDERED, *others):
            rows = [batch[REORDERED[name]] for batch in batches] if name in REORDERED else batches
            losses, gradients, ms = runs[first if name in REORDERED else name].train(rows, steps if name in cases else COMPARED + 2)
            row = {"case": name, "steps": len(losses), "ms": round(ms, 1)}
            if references:
                alone = references["data=1"]
                row |= {"gradients": apart(gradients, alone[1]), "worst": worst(gradients, alone[1])}
                if name in cases and without_pipe(name) not in (name, "data=1"):
                    row |= {"without pipe": apart(gradients, references[without_pipe(name)][1])}
                row |= {"loss": max(abs(a - b) for a, b in zip(losses[:COMPARED], alone[0]))}
            references[name] = losses, gradients
            yield row | {"last loss": losses[-1]}

    return measure


def norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def apart(found, expected) -> float:
    """The norm of the difference of two trees, as part of the norm of the second."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    squares = [(norm(np.asarray(a, np.float64) - b) ** 2, norm(b) ** 2) for a, b in pairs]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


def worst(found, expected) -> tuple[str, float]:
    """The array that is farthest by itself."""
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    return max(((jax.tree_util.keystr(path), apart([a], [b])) for (path, a), b in pairs if norm(b)), key=lambda pair: pair[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precision", choices=["bf16", "fp8", "fp8_reference"])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--length", type=int, default=1024, help="of sequences; fewer for a rehearsal on a CPU")
    options = parser.parse_args()
    for row in prepare(options.precision, options.cases, options.steps, options.length)():
        print(json.dumps(row), flush=True)
