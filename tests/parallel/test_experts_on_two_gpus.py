"""Experts spread over two Hopper GPUs against one of them, and against float32."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.model import module, moe
from dsv3_jax.parallel import exchange
from dsv3_jax.precision import FLOAT32, recipe
from tests.parallel import test_exchange

pytestmark = pytest.mark.multi_gpu

# Widths that the kernels are made for, and experts of about 1,024 rows on each GPU, which do not divide into tiles.
CONFIG = dataclasses.replace(test_exchange.CONFIG, hidden_size=1024, moe_intermediate_size=512, initializer_range=0.03)
SIZES = {"expert": 2}


def compiled(precision: str) -> dict:
    """{"two", "one", "float32"}: the experts' outputs and gradients as compiled functions of the arguments that follow; and those."""
    made = jax.jit(
        lambda: (
            module.init(lambda rngs: moe.MoE(CONFIG, FLOAT32, rngs), jax.random.key(0)),
            jax.random.normal(jax.random.key(1), (8, 1024, 1024)),
            jax.random.normal(jax.random.key(2), (8, 1024, 1024)),
        )
    )
    shapes = jax.eval_shape(made)
    with pytest.MonkeyPatch.context() as patch:  # while its functions are traced
        patch.setattr(test_exchange, "CONFIG", CONFIG)
        runs = {
            "two": test_exchange.value_and_gradients(recipe(precision), SIZES, exchange.over_mesh(CONFIG, SIZES, 1.6)),
            "one": test_exchange.value_and_gradients(recipe(precision)),
            "float32": test_exchange.value_and_gradients(FLOAT32),
        }
        lowered = {name: run.lower(*shapes) for name, run in runs.items()}
    return {name: one.compile() for name, one in lowered.items()} | {"arguments": made.lower().compile()}


def errors(runs: dict) -> dict[str, tuple[float, float]]:
    """Of the outputs and each gradient over two GPUs: (distance to one GPU's, to float32's), as parts of the norm."""
    arguments = jax.device_get(runs["arguments"]())
    two, fill = runs["two"](*arguments)
    assert 0.5 < fill <= 1
    one, exact = (runs[name](*arguments)[0] for name in ("one", "float32"))
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))  # noqa: E731
    found = {}
    for (path, a), b, c in zip(jax.tree.leaves_with_path(two), jax.tree.leaves(one), jax.tree.leaves(exact), strict=True):
        if norm(c):  # the router's bias gets no gradient
            a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
            found[jax.tree_util.keystr(path)] = norm(a - b) / norm(b), norm(a - c) / norm(c)
    return found


@pytest.mark.parametrize("precision, to_one, to_float32", [("bf16", 0.005, 0.08), ("fp8", 0.01, 0.12)])
def test_experts_over_two_gpus_are_those_of_one(precision, to_one, to_float32):
    """A token's experts are summed on each GPU, then over them: one rounding more. Against float32 some tokens, rounded, go elsewhere."""
    found = errors(compiled(precision))
    print(precision, {name: f"{one:.1e} {exact:.1e}" for name, (one, exact) in found.items()})
    assert len(found) == 5
    assert max(pair[0] for pair in found.values()) < to_one, found
    assert max(pair[1] for pair in found.values()) < to_float32, found
