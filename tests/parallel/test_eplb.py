"""EPLB against plans made by DeepSeek's own, and changed plans against the bounds they are made for."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.parallel.eplb import imbalance, moved_bytes, moved_replicas, moving_average, rebalance_experts

DATA = np.load(Path(__file__).parents[1] / "data" / "eplb.npz")
CASES = sorted({name.split("_")[0] for name in DATA.files if name.startswith("case")})
LOGNORMAL = np.exp(np.random.default_rng(5).standard_normal((3, 256)))
SIZES = {  # replicas, groups, nodes, GPUs
    "one node": (DATA["esft_load"] + 1e-4, (72, 1, 1, 8)),
    "two replicas a GPU": (DATA["esft_load"] + 1e-4, (128, 1, 1, 64)),
    "hierarchical": (DATA["esft_load"] + 1e-4, (80, 8, 4, 16)),
    "V3, prefill": (LOGNORMAL, (288, 8, 4, 32)),
    "V3, decode": (LOGNORMAL, (288, 8, 18, 144)),
    "V3, one host": (LOGNORMAL, (288, 8, 1, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_upstream(case):
    weight, sizes = DATA[f"{case}_weight"], DATA[f"{case}_sizes"].tolist()
    phy2log, log2phy, logcnt = rebalance_experts(weight, *sizes)
    np.testing.assert_allclose(imbalance(weight, phy2log, sizes[3]), DATA[f"{case}_imbalance"], rtol=2e-6)
    np.testing.assert_array_equal(logcnt, DATA[f"{case}_logcnt"])
    if not DATA[f"{case}_ties"]:  # equal loads may come in any order
        np.testing.assert_array_equal(phy2log, DATA[f"{case}_phy2log"])
        np.testing.assert_array_equal(np.sort(log2phy), np.sort(DATA[f"{case}_log2phy"]))


def check_plan(plan, weight, num_replicas, num_groups, num_nodes, num_gpus):
    phy2log, log2phy, logcnt = plan
    num_experts = weight.shape[1]
    assert phy2log.shape == (len(weight), num_replicas)
    for layer, experts in enumerate(phy2log.tolist()):
        for expert in range(num_experts):
            replicas = [r for r in range(num_replicas) if experts[r] == expert]
            assert len(replicas) == logcnt[layer, expert] >= 1
            padding = [-1] * (log2phy.shape[2] - len(replicas))
            assert log2phy[layer, expert].tolist() == replicas + padding
        if num_groups % num_nodes == 0:
            homes = {(e // (num_experts // num_groups), r // (num_replicas // num_nodes)) for r, e in enumerate(experts)}
            assert len(homes) == num_groups  # each group on one node


def second_copies(phy2log, num_gpus):
    """Replicas that share their GPU with another of the same expert: they help nobody."""
    return sum(len(gpu) - len(set(gpu)) for layer in phy2log for gpu in layer.reshape(num_gpus, -1).tolist())


@pytest.mark.parametrize("name", SIZES)
def test_changed_plans_move_little_and_stay_even(name):
    weight, sizes = SIZES[name]
    gpus = sizes[3]
    rng = np.random.default_rng(0)
    current = rebalance_experts(weight, *sizes)[0]
    moved_fresh = []
    for _ in range(6):
        weight = weight * np.exp(0.1 * rng.standard_normal(weight.shape))
        fresh = rebalance_experts(weight, *sizes)[0]
        plan = rebalance_experts(weight, *sizes, previous=current)
        check_plan(plan, weight, *sizes)
        assert ((plan[0] != current).mean(1) <= 0.25).all()  # what stays keeps its index
        assert (moved_replicas(current, plan[0], gpus) <= 0.25 * sizes[0]).all()
        assert (imbalance(weight, plan[0], gpus) <= 1.05 * imbalance(weight, fresh, gpus)).all()
        assert second_copies(plan[0], gpus) <= second_copies(current, gpus)
        moved_fresh.append(moved_replicas(current, fresh, gpus).mean() / sizes[0])
        current = plan[0]
    assert np.mean(moved_fresh) > 0.5  # the bound would fail for fresh plans


@pytest.mark.parametrize("name", SIZES)
def test_an_even_plan_is_kept(name):
    weight, sizes = SIZES[name]
    plan = rebalance_experts(weight, *sizes)
    np.testing.assert_array_equal(rebalance_experts(weight * 3, *sizes, previous=plan[0])[0], plan[0])
    # So is one within 4% of a fresh plan: nothing is moved for so little.
    drifted = weight * np.exp(0.02 * np.random.default_rng(2).standard_normal(weight.shape))
    fresh = rebalance_experts(drifted, *sizes)[0]
    ratio = imbalance(drifted, plan[0], sizes[3]) / imbalance(drifted, fresh, sizes[3])
    close = (ratio > 1.001) & (ratio < 1.039)
    assert close.any()
    np.testing.assert_array_equal(rebalance_experts(drifted, *sizes, previous=plan[0])[0][close], plan[0][close])


@pytest.mark.parametrize("name", SIZES)
def test_another_load_altogether_is_approached_within_the_bound(name):
    weight, sizes = SIZES[name]
    old = rebalance_experts(weight, *sizes)[0]
    other = np.random.default_rng(1).permuted(weight, axis=1)
    steps = [old]
    for _ in range(4):
        plan = rebalance_experts(other, *sizes, previous=steps[-1])
        check_plan(plan, other, *sizes)
        assert ((plan[0] != steps[-1]).mean(1) <= 0.25).all()
        steps.append(plan[0])
    course = np.array([imbalance(other, plan, sizes[3]).mean() for plan in steps])
    assert (np.diff(course) < 1e-6).all()
    assert course[-1] < course[0]


def test_moved_replicas_and_bytes_count_what_each_gpu_must_fetch():
    rng = np.random.default_rng(2)
    old, new = rng.integers(0, 6, (2, 5, 12))
    expected = [
        sum(sum((Counter(b[g : g + 3].tolist()) - Counter(a[g : g + 3].tolist())).values()) for g in range(0, 12, 3))
        for a, b in zip(old, new)
    ]
    assert moved_replicas(old, new, 4).tolist() == expected
    assert moved_bytes(old, new, 4, 1000) == 1000 * sum(expected) > 0
    assert moved_bytes(old, old.reshape(5, 4, 3)[:, :, ::-1].reshape(5, 12), 4, 1000) == 0  # order within a GPU costs nothing


def test_moving_average_predicts_better_than_the_last_interval():
    rng = np.random.default_rng(3)
    truth = DATA["esft_load"] * 1e4
    average = None
    for step in range(200):
        load = rng.poisson(truth)
        average = moving_average(average, load)
        if step == 0:
            np.testing.assert_array_equal(average, load)
    assert np.abs(average - truth).mean() < 0.5 * np.abs(load - truth).mean()
    np.testing.assert_allclose(moving_average(np.ones((1, 2)), [[3, 1]], decay=0.75), [[1.5, 1]])


@pytest.mark.parametrize("weight", [np.zeros((2, 8)), np.eye(8)[:2]])
def test_layers_without_load_or_with_one_busy_expert(weight):
    sizes = 16, 4, 2, 8
    plan = rebalance_experts(weight, *sizes)
    check_plan(plan, weight, *sizes)
    again = rebalance_experts(weight[::-1], *sizes, previous=plan[0])
    check_plan(again, weight, *sizes)
    if not weight.any():
        np.testing.assert_array_equal(imbalance(weight, plan[0], 8), 1)


@pytest.mark.parametrize(
    "weight, sizes, previous, message",
    [
        (np.ones((2, 8)), (7, 1, 1, 1), None, "use at least 8"),
        (np.ones((2, 8)), (16, 3, 1, 4), None, "8 experts do not divide evenly over 3 groups"),
        (np.ones((2, 8)), (16, 2, 3, 4), None, "4 GPUs do not divide evenly over 3 nodes"),
        (np.ones((2, 8)), (15, 2, 2, 4), None, "15 replicas do not divide evenly over 4 GPUs"),
        (np.ones((2, 8)), (16, 2, 0, 4), None, "over 0 nodes"),
        (np.ones(8), (16, 2, 2, 4), None, "[layers, experts]"),
        (-np.ones((2, 8)), (16, 2, 2, 4), None, "not negative"),
        (np.full((2, 8), np.nan), (16, 2, 2, 4), None, "finite"),
        (np.ones((1, 8)), (16, 2, 2, 4), [[0, 1, 2, 3, 4, 5, 6, 7]], "shape (1, 8), not (1, 16)"),
        (np.ones((1, 8)), (16, 2, 2, 4), [[0] * 16], "every one of 8 experts"),
        (np.ones((1, 8)), (16, 2, 2, 4), [[0, 1, 2, 3, 4, 5, 6, 8] * 2], "every one of 8 experts"),
        (np.ones((1, 8)), (16, 2, 2, 4), [[0, 1, 2, 3, 4, 5, 6, 7] * 2], "over several of 2 nodes"),
    ],
)
def test_bad_input(weight, sizes, previous, message):
    with pytest.raises(ValueError) as error:
        rebalance_experts(weight, *sizes, previous=previous)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_imports_without_jax():
    subprocess.run([sys.executable, "-c", "import sys; sys.modules['jax'] = None; import dsv3_jax.parallel.eplb"], check=True, timeout=60)
