"""Pipeline schedules against the published DualPipe, the published formulas, and an interpreter of the executor's table."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.parallel.schedule import KINDS, build, main, simulate, validate
from dsv3_jax.parallel.schedule_draw import STYLE
from dsv3_jax.parallel.schedule_table import MESSAGES, make_table

CASES = json.loads((Path(__file__).parents[1] / "data" / "dualpipe.json").read_text())["cases"]
UNIT = {"F": 1, "I": 1, "W": 1, "FB": 3}
SIZES = [(1, 4), (2, 4), (2, 7), (4, 8), (4, 11), (6, 16), (8, 20), (16, 40)]


SCHEDULES = [
    (kind, ranks, microbatches)
    for kind in KINDS
    for ranks, microbatches in SIZES
    if kind != "dualpipe" or (ranks % 2 == 0 and microbatches % 2 == 0)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}-{case['ranks']}-{case['microbatches']}")
def test_equals_the_published_schedule(case):
    schedule = build(case["kind"], num_ranks=case["ranks"], num_microbatches=case["microbatches"])
    assert [[list(action) for action in actions] for actions in schedule.actions] == case["actions"]
    assert [list(starts) for starts in simulate(schedule, UNIT).starts] == case["starts"]
    for expected in case["simulations"]:
        simulation = simulate(schedule, expected["cost"])
        assert simulation.makespan == expected["makespan"]
        assert [ends[-1] for ends in simulation.ends] == expected["end_per_rank"]
        assert list(simulation.busy) == expected["busy_per_rank"]
        assert list(simulation.bubble) == expected["bubble_per_rank"]
        assert list(simulation.peak_activations) == case["peak_activations"]


@pytest.mark.parametrize("kind, ranks, microbatches", SCHEDULES)
def test_bubble_and_activations_follow_the_formulas(kind, ranks, microbatches):
    schedule = build(kind, num_ranks=ranks, num_microbatches=microbatches)
    validate(schedule)
    simulation = simulate(schedule, UNIT)
    forward, backward, weight, overlapped = 1, 2, 1, 3
    bubble = {  # of the DualPipe README; gpipe's is 1f1b's
        "gpipe": (ranks - 1) * (forward + backward),
        "1f1b": (ranks - 1) * (forward + backward),
        "zb1p": (ranks - 1) * (forward + backward - 2 * weight),
        "dualpipe": (ranks / 2 - 1) * (overlapped + backward - 3 * weight),
        "dualpipev": (ranks - 1) * (overlapped + backward - 3 * weight),  # 2 * ranks stages, folded
    }[kind]
    assert set(simulation.bubble) == {bubble}
    peak = {
        "gpipe": [microbatches] * ranks,
        "1f1b": [ranks - rank for rank in range(ranks)],
        "zb1p": [ranks] * ranks,
        "dualpipe": [ranks + 1] * ranks,
        "dualpipev": [2 * ranks + 1] * ranks,
    }[kind]
    assert list(simulation.peak_activations) == peak


@pytest.mark.parametrize(
    "kind, ranks, microbatches, message",
    [
        ("interleaved", 4, 8, "gpipe, 1f1b, zb1p, dualpipe, dualpipev"),
        ("gpipe", 0, 8, "at least 1"),
        ("gpipe", 4, 0, "use 1"),
        ("1f1b", 4, 3, "use 4"),
        ("zb1p", 4, 3, "use 4"),
        ("dualpipe", 3, 20, "use 2 or 4"),
        ("dualpipe", 1, 20, "use 2,"),
        ("dualpipe", 0, 20, "at least 2"),
        ("dualpipe", 4, 6, "use 8"),
        ("dualpipe", 4, 9, "use 10"),
        ("dualpipev", 4, 7, "use 8"),
    ],
)
def test_bad_sizes_name_the_nearest_valid_choice(kind, ranks, microbatches, message):
    with pytest.raises(ValueError, match=message) as error:
        build(kind, num_ranks=ranks, num_microbatches=microbatches)
    assert "\n" not in str(error.value)


def edited(rank, edit):
    schedule = build("zb1p", num_ranks=2, num_microbatches=3)
    actions = [list(a) for a in schedule.actions]
    actions[rank] = edit(actions[rank])
    return replace(schedule, actions=tuple(map(tuple, actions)))


@pytest.mark.parametrize(
    "rank, edit, message",
    [
        (0, lambda a: a[:-1], "never finished"),
        (1, lambda a: [*a, ("F", 0, 0)], "out of order or twice"),
        (1, lambda a: [*a, ("F", 0, 3)], "does not exist"),
        (1, lambda a: [*a, ("F", 1, 0)], "does not exist"),
        (0, lambda a: [x for x in a if x[0] != "I"], "out of order"),
        (0, lambda a: sorted(a, key=lambda x: (x[2], "FIW".index(x[0]))), None),  # no overlap, but correct
        (1, lambda a: sorted(a, key=lambda x: (-x[2], "FIW".index(x[0]))), "deadlock"),  # rank 0 waits for 0 back, rank 1 for 2 first
    ],
)
def test_validate_finds_broken_schedules(rank, edit, message):
    schedule = edited(rank, edit)
    if message is None:
        validate(schedule)
    else:
        with pytest.raises(ValueError, match=message):
            validate(schedule)


class Ring:
    """Slots that may only be read while they hold something; -1 writes nowhere and reads nothing."""

    def __init__(self, slots):
        self.slots = [None] * slots

    def read(self, slot):
        assert slot >= 0
        assert self.slots[slot] is not None
        return self.slots[slot]

    def write(self, slot, value):
        if slot >= 0:
            self.slots[slot] = value


@pytest.mark.parametrize("kind, ranks, microbatches", SCHEDULES)
@pytest.mark.parametrize("max_delayed", [None, 2, 0])
def test_table_moves_every_value_to_where_it_is_needed(kind, ranks, microbatches, max_delayed):
    """Executes the table with names in place of arrays: (direction, microbatch, stage) is a stage's output, or its input's cotangent."""
    schedule = build(kind, num_ranks=ranks, num_microbatches=microbatches, max_delayed=max_delayed)
    validate(schedule)
    table = make_table(schedule)
    chunks, last = schedule.num_chunks, schedule.num_stages - 1
    residuals = [Ring(table.residual_slots) for _ in range(ranks)]
    stashes = [Ring(table.stash_slots) for _ in range(ranks)]
    inputs = [[Ring(n) for n in table.forward_slots] for _ in range(ranks)]
    cotangents = [[Ring(n) for n in table.backward_slots] for _ in range(ranks)]
    gradients = [[] for _ in range(ranks)]

    for t in range(table.num_ticks):
        outputs, writes = [{} for _ in range(ranks)], []
        for r in range(ranks):
            name = table.actions[table.action[t, r]]
            for op, p in () if name == "idle" else zip(name[::2], map(int, name[1::2])):
                stage, direction = schedule.stage(r, p), p if kind == "dualpipe" else 0
                if op == "F":
                    m = table.f_microbatch[t, r]
                    if stage == 0:
                        assert table.f_input[t, r] == -1
                    else:
                        assert inputs[r][p].read(table.f_input[t, r]) == (direction, m, stage - 1)
                    writes.append((residuals[r], table.f_residual[t, r], (p, m)))
                    outputs[r][f"F{p}"] = (direction, m, stage)
                elif op in "BI":
                    m = table.b_microbatch[t, r]
                    expected = (direction, m, stage) if stage == last else (direction, m, stage + 1)
                    assert cotangents[r][p].read(table.b_input[t, r]) == expected
                    assert residuals[r].read(table.b_residual[t, r]) == (p, m)
                    outputs[r][f"B{p}"] = (direction, m, stage)
                    if op == "I":
                        writes.append((stashes[r], table.b_stash[t, r], (p, m)))
                    else:
                        assert table.b_stash[t, r] == -1
                        gradients[r].append((p, m))
                else:
                    done = stashes[r].read(table.w_stash[t, r])
                    assert done[0] == p
                    gradients[r].append(done)
        for ring, slot, value in writes:
            assert slot >= 0
            ring.write(slot, value)
        for r in range(ranks):
            for p in range(chunks):
                source, target = schedule.producer(r, p), schedule.consumer(r, p)
                for arrives, ring, slot in (
                    ((source[0], f"F{source[1]}") if source else None, inputs[r][p], table.keep_forward[t, r, p]),
                    ((target[0], f"B{target[1]}") if target else (r, f"F{p}"), cotangents[r][p], table.keep_backward[t, r, p]),
                ):
                    if slot >= 0:
                        peer, message = arrives
                        ring.write(slot, outputs[peer][message])
                        assert table.sends[t, peer, MESSAGES.index(message)] == (peer != r)

    for r in range(ranks):
        per_chunk = schedule.microbatches_per_chunk
        assert sorted(gradients[r]) == [(p, schedule.microbatch(p, c)) for p in range(chunks) for c in range(per_chunk)]
    received = (table.keep_forward >= 0).sum() + (table.keep_backward >= 0).sum()
    boundaries = schedule.num_microbatches * last * 2  # forward and backward over every edge between stages
    local = schedule.num_microbatches * (1 + 2 * (kind == "dualpipev"))  # the loss, and the turn of the V both ways
    assert received == boundaries + schedule.num_microbatches
    assert table.sends.sum() == received - local


@pytest.mark.parametrize(
    "kind, ranks, microbatches, ticks, residual, stash, bubble",
    [  # as an independent prototype had them; None: not recorded
        ("dualpipe", 4, 8, 16, 5, None, None),
        ("dualpipev", 4, 8, 34, 9, None, None),
        ("dualpipe", 8, 20, None, 9, None, 12),
        ("dualpipev", 8, 20, None, 17, None, 32),
        ("dualpipe", 16, 64, 102, 17, 8, 32),
        ("dualpipev", 16, 64, 206, 33, 16, 72),
        ("dualpipe", 16, 120, None, 17, 8, 32),
        ("dualpipev", 16, 120, None, 33, 16, 72),
        ("zb1p", 16, 120, None, 16, None, 15),
    ],
)
def test_table_sizes(kind, ranks, microbatches, ticks, residual, stash, bubble):
    schedule = build(kind, num_ranks=ranks, num_microbatches=microbatches)
    table = make_table(schedule)
    if ticks is not None:
        assert table.num_ticks == ticks
    assert table.residual_slots == residual == max(simulate(schedule, UNIT).peak_activations)
    if stash is not None:
        assert table.stash_slots == stash
    if kind == "dualpipe":
        assert (table.forward_slots, table.backward_slots) == ((2, 2), (1, 1))
    if kind == "dualpipev":
        assert (table.forward_slots, table.backward_slots) == ((2, 1), (1, 1))
    if bubble is not None:  # a tick lasts as long as the longest of its actions
        cost = np.array([0 if name == "idle" else 3 if len(name) == 4 else 2 if name[0] == "B" else 1 for name in table.actions])
        assert cost[table.action].max(1).sum() - simulate(schedule, UNIT).busy[0] == bubble


@pytest.mark.parametrize("most", [0, 1, 4])
def test_few_delayed_weight_gradients_take_few_slots(most):
    """And hardly any time: an input gradient that computes its forward again takes two units."""
    costs = {"I": 2, "F": 1, "B": 3, "W": 1}

    def lockstep(max_delayed):
        table = make_table(build("dualpipev", num_ranks=16, num_microbatches=120, max_delayed=max_delayed))
        assert table.stash_slots == (16 if max_delayed is None else max_delayed)
        assert ("W0" in table.actions) == (max_delayed != 0)
        cost = np.array([0 if name == "idle" else sum(costs[letter] for letter in name[::2]) for name in table.actions])
        return cost[table.action].max(1).sum()

    assert lockstep(most) < 1.03 * lockstep(None)
    if most == 0:
        assert lockstep(most) <= lockstep(None)


def test_draw_writes_a_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "out.png"
    main(["draw", "--kind", "dualpipev", "--ranks", "2", "--microbatches", "4", "--output", str(path)])
    pixels = image.imread(path)
    assert pixels.shape[1] > pixels.shape[0] > 100
    seen = {tuple(colour) for colour in np.unique((pixels[..., :3] * 255).round().astype(int).reshape(-1, 3), axis=0)}
    for name, *colours in STYLE.values():
        for colour in colours:
            assert tuple(bytes.fromhex(colour[1:])) in seen, name


@pytest.mark.parametrize(
    "arguments, hide, message",
    [
        (["--kind", "dualpipe", "--ranks", "7"], False, "use 6 or 8"),
        (["--kind", "vpp"], False, "invalid choice: 'vpp'"),
        ([], True, "extra `plots`"),
    ],
)
def test_draw_fails_in_one_line(tmp_path, monkeypatch, arguments, hide, message):
    if hide:
        for name in ("matplotlib", "matplotlib.figure", "matplotlib.patches"):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=message) as error:
        main(["draw", *arguments, "--output", str(tmp_path / "out.png")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.png").exists()


def test_imports_without_jax():
    modules = "dsv3_jax.parallel.schedule, dsv3_jax.parallel.schedule_table"
    code = f"import sys; sys.modules['jax'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
