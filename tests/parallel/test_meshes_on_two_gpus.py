"""Training over two Hopper GPUs against one of them (compare_on_gpus.py): every axis of a mesh, and schedules over `pipe`."""

import pytest

from tests.parallel import compare_on_gpus

pytestmark = pytest.mark.multi_gpu

CASES = ["data=2", "expert=2", "dualpipev:pipe=2", "dualpipe:pipe=2", "zb1p:pipe=2"]


@pytest.mark.parametrize("precision, gradients", [("bf16", 0.005), ("fp8", 0.015)])
def test_two_gpus_train_as_one(precision, gradients):
    """What is rounded once more: a token's sum over the experts of two GPUs, and in FP8 tiles of tokens that do not reach across. Losses of
    20 steps part by themselves, from one order of a batch's rows to another on one GPU: a mesh may do that three times as far."""
    rounding = None
    for row in compare_on_gpus.prepare(precision, CASES, steps=30)():
        print(precision, row)
        if row["case"] == compare_on_gpus.REVERSED:
            rounding = row["loss"]
        elif row["case"] in CASES:
            assert row["steps"] == 30 and row["gradients"] < gradients and row["loss"] < 3 * rounding, row
