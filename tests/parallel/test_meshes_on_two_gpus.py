"""Training over two Hopper GPUs against one of them (compare_on_gpus.py): every axis of a mesh, and schedules over `pipe`.

A case compiles for minutes, mostly one kernel after the other: `-n 5` gives each a process of its own.
"""

import pytest

from tests.parallel import compare_on_gpus

pytestmark = pytest.mark.multi_gpu


@pytest.mark.parametrize("case", ["data=2", "expert=2", "dualpipev:pipe=2", "dualpipe:pipe=2", "zb1p:pipe=2"])
@pytest.mark.parametrize("precision, all_gradients, each_gradient", [("bf16", 3e-4, 5e-4), ("fp8", 0.015, 0.1)])
def test_two_gpus_train_as_one(precision, all_gradients, each_gradient, case):
    """The first gradients, all together and each array's, are one GPU's but for what is rounded once more: a token's sum over the experts
    of two GPUs, and in FP8 tiles of tokens that do not reach across. Losses of 20 steps part by themselves, on one GPU from one order of a
    batch's rows to another: a mesh may do that three times as far."""
    rows = {}
    for row in compare_on_gpus.prepare(precision, [case], steps=30)():
        print(precision, row, flush=True)
        rows[row["case"]] = row
    rounding = max(rows[name]["loss"] for name in compare_on_gpus.REORDERED)
    found = rows[case]
    assert found["steps"] == 30
    assert found["gradients"] < all_gradients and found["worst"][1] < each_gradient, found
    assert 0 < found["loss"] < 3 * rounding, (found, rounding)
