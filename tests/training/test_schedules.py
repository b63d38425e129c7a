"""Schedules against the numbers of the report (section 4.2)."""

import dataclasses
import itertools
import math

import pytest

from configs import deepseek_v3
from dsv3_jax.config import OptimizerConfig, TrainConfig
from dsv3_jax.errors import UserError
from dsv3_jax.training import schedules

T = 10**12


@pytest.fixture(scope="module")
def v3():
    """The report's run; 242,782 steps are what its 14.8T tokens make with a ramp that is linear in tokens."""
    return dataclasses.replace(deepseek_v3.recipe(), steps=242_782)


def test_the_report_s_budget(v3):
    assert schedules.total_tokens(v3) == pytest.approx(14.8e12, rel=1e-5)


def test_steps_add_up_to_the_budget(v3):
    """Taking all steps one after the other, with whole batches, consumes 14.8T tokens; the ramp takes about 15,000 of them."""
    rows, in_ramp = 0, 0
    for _ in range(v3.steps):
        size = schedules.batch_size(v3, rows * 4096)
        in_ramp += size < 15360
        rows += size
        assert 3072 <= size <= 15360 and size % 3072 == 0
    assert rows * 4096 == pytest.approx(14.8e12, rel=5e-3)
    assert in_ramp == pytest.approx(15_000, rel=0.15)  # batches are multiples of the first, and round


@pytest.mark.parametrize(
    "step, tokens, expected",
    [
        (0, 0, 2.2e-4 / 2000),
        (999, 0.02 * T, 1.1e-4),
        (1999, 0.04 * T, 2.2e-4),
        (50_000, 3 * T, 2.2e-4),
        (160_000, 9.99 * T, 2.2e-4),
        (200_000, (10 + 4.3 / 2) * T, (2.2e-4 + 2.2e-5) / 2),  # the middle of the cosine
        (200_000, (10 + 4.3 / 3) * T, 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.75),
        (230_000, 14.29999 * T, 2.2e-5),
        (235_000, 14.5 * T, 2.2e-5),
        (235_000, 14.632 * T, 2.2e-5),
        (240_000, 14.64 * T, 7.3e-6),
        (242_000, 14.799 * T, 7.3e-6),
    ],
)
def test_learning_rate(v3, step, tokens, expected):
    assert schedules.learning_rate(v3, step, int(tokens)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tokens, weight, speed", [(0, 0.3, 1e-3), (9.9, 0.3, 1e-3), (10.1, 0.1, 1e-3), (14.2, 0.1, 1e-3), (14.4, 0.1, 0)])
def test_mtp_weight_and_bias_speed(v3, tokens, weight, speed):
    scheduled = schedules.scheduled(v3, 100_000, int(tokens * T))
    assert (scheduled.mtp_loss_weight, scheduled.bias_update_speed) == (weight, speed)


@pytest.mark.parametrize("tokens, size", [(0, 3072), (469e9 / 2, 9216), (469e9, 15360), (1e12, 15360)])
def test_batch_ramp_is_linear_in_tokens(v3, tokens, size):
    assert schedules.batch_size(v3, int(tokens)) == size
    finer = dataclasses.replace(v3, microbatch_size=128)
    assert schedules.batch_size(finer, int(tokens)) == pytest.approx(size, abs=128)


def test_a_short_run_has_the_same_phases():
    config = TrainConfig(steps=148, batch_size=2, sequence_length=10, optimizer=OptimizerConfig(warmup_steps=4))
    rates = [step.scheduled.learning_rate for step in schedules.steps(config)]
    assert rates[:4] == pytest.approx([2.2e-4 * k / 4 for k in (1, 2, 3, 4)])
    assert set(rates[4:100]) == {2.2e-4}
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[100:143]))
    assert rates[-1] == pytest.approx(7.3e-6) and rates[144] == pytest.approx(2.2e-5)


def test_steps_go_on_where_they_stopped():
    config = TrainConfig(steps=40, batch_size=8, batch_ramp_from=2, batch_ramp_end=0.5, sequence_length=16)
    whole = list(schedules.steps(config))
    assert [step.number for step in whole] == list(range(40))
    assert all(a.first_row + a.num_rows == b.first_row for a, b in itertools.pairwise(whole))
    assert {step.num_rows for step in whole} == {2, 4, 6, 8}
    assert all(step.tokens == 16 * step.first_row for step in whole)
    assert list(schedules.steps(config, 17, whole[17].first_row)) == whole[17:]


def test_fields_that_do_not_fit():
    with pytest.raises(UserError, match="microbatch_size=3 must divide batch_size=8"):
        TrainConfig(batch_size=8, microbatch_size=3)
    with pytest.raises(UserError, match="batch_ramp_from=9"):
        TrainConfig(batch_size=8, batch_ramp_from=9)
    with pytest.raises(UserError, match="decay_start"):
        OptimizerConfig(decay_start=0.9, decay_end=0.5)
    assert math.isfinite(schedules.total_tokens(TrainConfig(batch_ramp_from=1, batch_ramp_end=1.0)))
