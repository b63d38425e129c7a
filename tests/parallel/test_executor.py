"""The pipeline executor against one device (compare_schedules.py, in processes of its own, so that a deadlock is a failure), and what it
refuses."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel import placement, sharding
from dsv3_jax.parallel.schedule import KINDS, build
from dsv3_jax.parallel.schedule_table import make_table
from dsv3_jax.training import pipeline

STACKS = {"dense_layers": 2, "moe_layers": 5}
ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=7,
    intermediate_size=16,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    first_k_dense_replace=2,
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    rope_scaling=None,
)


def compare(precision: str, *cases: str) -> list[dict]:
    command = [sys.executable, "tests/parallel/compare_schedules.py", precision, *cases]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["case"] for row in rows] == list(cases)
    return rows


def check(rows: list[dict], tolerance: float, others: float | None = None) -> None:
    for row in rows:
        assert max(row["loss"], row["layers"]) < tolerance and row["others"] < (others or tolerance) and row["load"] == 0, row


def test_dualpipev_with_experts_is_one_device():
    check(compare("float64", "dualpipev:pipe=2,expert=2"), 1e-9)


MESHES = [f"data={d},pipe={p},expert={e}" for p, e, d in itertools.product((2, 4, 8), (1, 2, 4), (1, 2)) if p * e * d <= 8]


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_is_one_device(kind, mesh, precision, tolerance):
    check(compare(precision, f"{kind}:{mesh}"), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dualpipev@0:pipe=2,expert=2", "dualpipev@1:pipe=4", "zb1p@1:pipe=4,data=2", "dualpipe@0:pipe=4"])
def test_few_delayed_weight_gradients(case):
    check(compare("float64", case), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dualpipev/layer:pipe=2,expert=2", "zb1p/none:pipe=2,data=2", "dualpipe@0/norms:pipe=4"])
def test_what_is_kept(case):
    check(compare("float64", case), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("precision, others", [("bf16", 0.02), ("fp8_reference", 0.05)])
@pytest.mark.parametrize("case", ["1f1b:pipe=2", "1f1b:pipe=2,expert=2", "dualpipev:pipe=2,expert=2", "dualpipev@0:pipe=2"])
def test_low_precision_is_the_same_on_any_number_of_ranks(case, precision, others):
    """In layers only float32 sums over microbatches are taken in another order. Head and MTP module work on a rank's rows of a
    microbatch, or its tokens: their gradients are rounded as often as there are parts, and FP8 tiles do not reach across."""
    check(compare(precision, case), 1e-5, others)


# dualpipe wants even numbers of ranks, dualpipev a layer for each of twice as many stages.
@pytest.mark.parametrize(
    "kind, ranks", [(kind, n) for kind in KINDS for n in (2, 3, 4) if (kind, n) not in (("dualpipe", 3), ("dualpipev", 4))]
)
def test_layers_have_one_place_in_order(kind, ranks):
    schedule = build(kind, num_ranks=ranks, num_microbatches=2 * ranks)
    chunks = placement.place(SMALL, schedule)
    copies = 2 if kind == "dualpipe" else 1
    for direction in range(copies):
        way = []
        for stage in range(schedule.num_stages):
            [(rank, p)] = [
                (r, p)
                for r in range(ranks)
                for p in range(schedule.num_chunks)
                if schedule.stage(r, p) == stage and (copies == 1 or p == direction)
            ]
            held = [(slot.stack, slot.layers[rank]) for slot in chunks[p] if slot.layers[rank] != placement.NONE]
            assert held
            way += held
        assert way == [("dense_layers", 0), ("dense_layers", 1), *(("moe_layers", i) for i in range(5))]


@pytest.mark.parametrize("kind, ranks", [("zb1p", 2), ("zb1p", 3), ("dualpipe", 4), ("dualpipev", 2), ("dualpipev", 3)])
def test_no_other_way_to_deal_out_layers_is_faster_in_lockstep(kind, ranks):
    schedule = build(kind, num_ranks=ranks, num_microbatches=4 * ranks)
    table, stages = make_table(schedule), schedule.num_stages

    def ticks(counts):
        """The sum over ticks of the longest action's layers."""
        total = 0
        for row in table.action:
            of_ranks = []
            for rank, action in enumerate(row):
                letters = re.findall(r"([FBIW])(\d)", table.actions[action])
                of_ranks.append(sum(counts[schedule.stage(rank, int(p))] * (2 if letter == "B" else 1) for letter, p in letters))
            total += max(of_ranks)
        return total

    chunks, counts = placement.place(SMALL, schedule), [0] * stages
    for r, p in itertools.product(range(ranks), range(schedule.num_chunks)):
        counts[schedule.stage(r, p)] = sum(slot.layers[r] != placement.NONE for slot in chunks[p])
    assert ticks(counts) == min(ticks(c) for c in itertools.product(range(1, 8), repeat=stages) if sum(c) == 7)


@pytest.mark.parametrize("kind", ["zb1p", "dualpipe", "dualpipev"])
def test_weights_reach_their_ranks_and_gradients_come_back(kind):
    """Leaves whose last dimension divides over data, over pipe too, and not at all."""
    sizes = meshes.parse("data=2,pipe=2")
    chunks = placement.place(SMALL, build(kind, num_ranks=2, num_microbatches=4))
    axes = {"w": ("layers", "mlp", "embed"), "v": ("layers", "embed"), "u": ("layers", "embed")}
    shapes = {"w": (2, 6), "v": (4,), "u": (3,)}
    stacks = {name: {k: jax.random.normal(jax.random.key(n), (n, *shape)) for k, shape in shapes.items()} for name, n in STACKS.items()}
    spec = {k: sharding.state_spec(axes[k], (9, *shapes[k]), sizes) for k in axes}
    splits = {k: sharding.splits(axes[k], (9, *shapes[k]), sizes) for k in axes}

    def there_and_back(stacks):
        rank = jax.lax.axis_index("pipe")
        slots = placement.to_rank(stacks, dict.fromkeys(STACKS, splits), chunks, rank)

        # What a rank holds in a slot without a layer must never come back.
        def used(slot, tree):
            return jax.tree.map(lambda leaf: jnp.where(jnp.array(slot.layers)[rank] == placement.NONE, 0, leaf), tree)

        used_slots = tuple(tuple(used(slot, tree) for slot, tree in zip(*row)) for row in zip(chunks, slots))
        return placement.from_rank(used_slots, dict.fromkeys(STACKS, splits), chunks), jax.tree.map(lambda leaf: leaf[None], slots)

    specs = dict.fromkeys(STACKS, spec)
    mesh = meshes.make("data=2,pipe=2", jax.devices()[:4])
    mapped = jax.shard_map(there_and_back, mesh=mesh, in_specs=(specs,), out_specs=(specs, PartitionSpec("pipe")), check_vma=False)
    back, held = jax.jit(mapped)(stacks)
    # The sum over both data ranks, and over both copies of dualpipe.
    expected = jax.tree.map(lambda w: (4 if kind == "dualpipe" else 2) * w, stacks)
    jax.tree.map(np.testing.assert_array_equal, back, expected)
    for slots, row in zip(chunks, held):
        for slot, tree in zip(slots, row):
            for rank, layer in enumerate(slot.layers):
                if layer != placement.NONE:
                    jax.tree.map(lambda leaf, w: np.testing.assert_array_equal(leaf[rank], w[layer]), tree, stacks[slot.stack])  # noqa: B023


@pytest.mark.parametrize(
    "kind, ranks, rows, message",
    [
        ("zb1p", 8, 16, r"zb1p on pipe=8 has 8 stages and the model only 7 layers: use pipe=7 or less"),
        ("dualpipev", 4, 8, r"8 stages and the model only 7 layers: use pipe=3 or less"),
        ("dualpipe", 8, 16, r"8 stages and the model only 7 layers: use pipe=6 or less"),
        ("zb1p", 2, 7, r"7 rows do not split into 4 microbatches on 1 devices of a rank each: use 8"),
    ],
)
def test_refused_before_any_compile(kind, ranks, rows, message):
    decoder = Decoder(SMALL)
    schedule = build(kind, num_ranks=ranks, num_microbatches=2 * ranks)
    mesh = meshes.make(f"pipe={ranks}", jax.devices()[:ranks])
    batch = {"tokens": jax.ShapeDtypeStruct((rows, 9), jnp.int32)}
    run = lambda params, batch: pipeline.pipeline_value_and_grad(  # noqa: E731
        decoder, params, batch, schedule, mesh, mtp_loss_weight=0.1, balance_loss_weight=0.1
    )
    with pytest.raises(UserError, match=message):
        jax.eval_shape(run, decoder.abstract_params(), batch)


@pytest.mark.parametrize(
    "kind, mesh, rows, message",
    [
        ("dualpipev", "pipe=2,expert=2", 6, r"needs at least 4 microbatches, not 3: use 4 \(a step of 6 sequences in microbatches of 2\)"),
        ("dualpipe", "pipe=3", 12, r"dualpipe needs an even number of ranks, not 3: use 2 or 4"),
        ("zb1p", "pipe=8", 8, r"use pipe=7 or less"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(kind, mesh, rows, message):
    config = TrainConfig(model=SMALL, batch_size=rows, pipeline_schedule=kind)
    with pytest.raises(UserError, match=message):
        pipeline.schedule(config, meshes.parse(mesh), rows)
