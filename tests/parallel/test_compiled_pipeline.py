"""What XLA makes of the pipeline for Hopper GPUs: compiled without any, read in the order in which the device runs it."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import exchange, sharding
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel.schedule import build
from dsv3_jax.parallel.schedule_table import make_table
from dsv3_jax.precision import BF16
from dsv3_jax.training.aot import attention_without_cudnn
from dsv3_jax.training.pipeline import pipeline_value_and_grad
from pallas_kernels import aot

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")]

ROWS, LENGTH, WIDTH = 1, 4096, 2048
MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=WIDTH,
    num_hidden_layers=5,
    intermediate_size=4096,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    v_head_dim=128,
    first_k_dense_replace=0,  # a slot of layers that not all ranks have is a conditional, beside which nothing of its own runs
    moe_intermediate_size=1024,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    rope_scaling=None,
)
SCHEDULE = build("dualpipev", num_ranks=2, num_microbatches=6)
TABLE = make_table(SCHEDULE)


@pytest.fixture(scope="module")
def computations():
    """The compiled pipeline of two ranks of two devices: {name of a computation: its instructions, in order}."""
    mesh = meshes.make("pipe=2,expert=2", aot.hopper(4))
    decoder = Decoder(MODEL, BF16, remat="norms_and_up", exchange=exchange.over_mesh(MODEL, mesh.shape, 2.0))
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    params = decoder.abstract_params()
    shardings = sharding.state_shardings(decoder.logical_axes(), params, mesh)
    rows = jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh.shape))
    tokens = jax.ShapeDtypeStruct((2 * ROWS * SCHEDULE.num_microbatches, LENGTH + 1), jnp.int32, sharding=rows)

    def run(params, tokens):
        weights = {"mtp_loss_weight": 0.3, "balance_loss_weight": 0.1}
        return pipeline_value_and_grad(decoder, params, {"tokens": tokens}, SCHEDULE, mesh, **weights)

    with attention_without_cudnn():
        lowered = jax.jit(run).lower(jax.tree.map(place, params, shardings), tokens)
        compiled = lowered.compile({"xla_gpu_autotune_level": 0})
    text = compiled.as_text()
    assert "is_scheduled=true" in text
    found = {}
    for name, body in re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        found[name] = [line.strip() for line in body.splitlines()]
    return found


def branches(computations) -> dict[str, str]:
    """The computation of each action: the branches of the conditional that has one for each."""
    pattern = r"branch_computations=\{([^}]*)\}"
    lists = [re.findall(r"[\w.-]+", found[1]) for body in computations.values() for line in body if (found := re.search(pattern, line))]
    [names] = [names for names in lists if len(names) == len(TABLE.actions)]
    return dict(zip(TABLE.actions, names))


def inside(computations, name) -> list[str]:
    """The instructions of a computation and of all that it calls."""
    lines = []
    for line in computations[name]:
        lines.append(line)
        for called in re.findall(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)", line):
            lines += inside(computations, called) if called in computations else []
        for called in re.findall(r"branch_computations=\{([^}]*)\}", line):
            for one in re.findall(r"[\w.-]+", called):
                lines += inside(computations, one)
    return lines


def is_product(computations, line) -> bool:
    if "custom-call" in line and re.search(r'custom_call_target="(mosaic_gpu|__cublas)', line):
        return "in_place_of_cudnn" not in line
    return any(re.search(r" dot\(", one) for called in re.findall(r"calls=%?([\w.-]+)", line) for one in computations.get(called, []))


@pytest.mark.parametrize("action", ["F0B1", "F1B0"])
def test_products_run_while_tokens_travel(computations, action):
    started, hidden, total = {}, 0, 0
    body = computations[branches(computations)[action]]
    for i, line in enumerate(body):
        # Those of rows; the gradients of the routing weights, a thousandth of their bytes, have one of their own.
        if found := re.match(r"%?([\w.-]+) = \(\((?:bf16|u16)\[.* all-to-all-start\(", line):
            started[found[1]] = i
        elif (found := re.search(r" all-to-all-done\(.*?%?([\w.-]+)\)", line)) and found[1] in started:
            total += 1
            hidden += any(is_product(computations, between) for between in body[started[found[1]] + 1 : i])
    assert total >= 4 and hidden >= 0.75 * total, (hidden, total)
    assert not [line for line in body if re.search(r" all-to-all\(", line)]  # one that does not run beside others


@pytest.mark.parametrize("action", ["F0B1", "F1B0"])
def test_forward_and_backward_do_not_wait_for_each_other(computations, action):
    """A product depends on all-to-alls of its own microbatch only: kernels that XLA makes of both would tie them together."""
    waits_for, products = {}, set()
    for line in computations[branches(computations)[action]]:
        name, text = re.match(r"(?:ROOT )?%?([\w.-]+) = (.*)", line).groups()
        operands = re.findall(r"%([\w.-]+)", re.split(r", (?:metadata|control-predecessors)=", text)[0])
        waits_for[name] = set().union(*(waits_for.get(operand, set()) for operand in operands))
        if own := set(re.findall(r'op_name="[^"]*/([FB])\d/', line)):
            if " all-to-all-done(" in line:
                waits_for[name] |= own
            elif is_product(computations, line):
                assert waits_for[name] <= own, line[:300]
                products |= waits_for[name]
    assert products == {"F", "B"}


def test_no_copy_of_a_ring(computations):
    """In no branch, and not between ticks."""
    value = f"{ROWS},{LENGTH},{WIDTH}"
    inputs = [rf"bf16\[{n + 1},{value}\]" for n in (sum(TABLE.forward_slots), sum(TABLE.backward_slots))]
    rings = inputs + [rf"\w+\[{n},\d+,\d+\S*\]" for n in (TABLE.residual_slots, TABLE.stash_slots)]
    of_actions = branches(computations)
    [tick] = [name for name, body in computations.items() if any(of_actions["F0B1"] in line for line in body)]
    lines = inside(computations, tick)
    for ring in rings:
        assert any(re.search(rf"= \(?{ring}", line) for line in lines)  # it is there
    copies = [line for line in lines if re.search(rf"= \(?({'|'.join(rings)})\S* copy", line)]
    assert not copies, copies[:3]


@pytest.mark.parametrize("action", ["F1", "I1", "B1", "F0B1", "F1B0"])
def test_a_layer_that_is_not_there_costs_nothing(computations, action):
    """A slot of chunk 1 that one of the ranks has no layer for: that rank reads no ring, fills nothing with zeros, and copies no more than
    what goes through, a value of the width of the model."""
    absent = []
    for line in computations[branches(computations)[action]]:
        if " conditional(" in line:
            called = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
            absent += [name for name in called if not any(is_product(computations, one) for one in inside(computations, name))]
    assert absent
    for line in (line for name in absent for line in inside(computations, name)):
        shapes, _, operation = line.partition(" = ")[2].partition("(")
        if not re.search(r" (parameter|tuple|get-tuple-element|custom-call)$", shapes):
            entries = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", shapes)]
            assert sum(entries) <= ROWS * LENGTH * WIDTH, line[:300]
        elif shapes.endswith("custom-call"):
            assert "AllocateBuffer" in operation, line[:300]
