"""What a call keeps the GPUs busy with: JAX's profile of it, as communication that computation hides or does not, and as the ticks of a
pipeline.

Communication is what NCCL's kernels take; it is exposed while no other kernel runs on the device.
"""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.parallel.schedule import simulate
from dsv3_jax.parallel.schedule_table import Table


class Busy(NamedTuple):
    """Milliseconds: of communication, of that what is exposed, and in which anything runs at all; the mean over devices."""

    communication: float
    exposed: float
    all: float


class Event(NamedTuple):
    """What ran on a GPU. start, end in nanoseconds; op: its name in the compiled program, or ""."""

    start: float
    end: float
    name: str
    op: str

    @property
    def sends(self) -> bool:
        return "nccl" in self.name.lower()


def profile(run: Callable[[], object], group_of: Callable[[str], str | None] = lambda op: "") -> dict[str, Busy]:
    """What one call of `run` keeps its devices busy with, by the group of the operation (its name in the compiled program; None: not
    known)."""
    devices = [kernels_of(events, group_of) for events in trace(run)]
    return busy([kernels for kernels in devices if kernels])


def trace(run: Callable[[], object]) -> list[list[Event]]:
    """Each GPU's events on its streams in one call, in order of their start."""

    def of(event):
        return Event(event.start_ns, event.start_ns + event.duration_ns, event.name, dict(event.stats).get("hlo_op", ""))

    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0  # what the host does is several times as many events
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            jax.block_until_ready(run())
        (file,) = Path(directory).glob("**/*.xplane.pb")
        found = {}
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/device:GPU:"):
                events = sorted(of(event) for line in plane.lines if line.name.startswith("Stream") for event in line.events)
                found[int(re.match(r"/device:GPU:(\d+)", plane.name)[1])] = events
    return [found[device] for device in sorted(found)]


def scopes(text: str) -> dict[str, str]:
    """Of the operations of a compiled program, by their names, the scopes in which they were made."""
    found = {}
    for line in text.splitlines():  # those with a kernel are hundreds of kilobytes long: no regular expression
        name, _, operation = line.partition(" = ")
        if 'op_name="' in operation:
            found[name.strip().removeprefix("ROOT ").removeprefix("%")] = operation.rpartition('op_name="')[2].partition('"')[0]
    return found


class Span(NamedTuple):
    """Time, in nanoseconds, that a pipeline's rank is at something. kind: index of an action of its table, or LOSS."""

    kind: int
    start: float
    end: float


LOSS = -1
_TICK = re.compile(r"/while/body/\w+/(?:(action)/cond/branch_(\d+)_fun|(output_loss)/cond/branch_1_fun)?")  # scopes of rank.py


def spans(events: list[Event], scopes: Mapping[str, str]) -> tuple[list[Span], tuple[float, float]]:
    """What a device does in the ticks of a pipeline, in order, and when the first begins and the last ends. scopes: of operations, by
    name. Events of operations of another scope, or of none, belong to what was begun before them."""
    found: list[tuple[Counter, float, float]] = []
    inside, begin, end = None, math.inf, -math.inf
    for event in events:
        if tick := _TICK.search(scopes.get(event.op, "")):
            begin, end = min(begin, event.start), max(end, event.end)
            before, inside = inside, tick[1] or tick[3]
            if inside and inside != before:
                found.append((Counter(), event.start, event.end))
            if inside:
                found[-1][0][int(tick[2]) if tick[1] else LOSS] += 1
        if inside:
            kinds, since, until = found[-1]
            found[-1] = kinds, since, max(until, event.end)
    # Of operations that several actions have in common some bear another's name.
    return [Span(kinds.most_common(1)[0][0], since, until) for kinds, since, until in found], (begin, end)


class Pipelined(NamedTuple):
    """The ticks of a step, in milliseconds, without the output loss, for which all ranks work together.

    costs: of actions by their letters, the mean; took: of all ticks; bubble: of that what a rank is not at an action, for each rank.
    free: (took, bubble) as simulated with those costs; lockstep: the same in ticks, each as long as its longest action, by the mean of
    that action on that rank. loss: all of it.
    """

    costs: dict[str, float]
    took: float
    bubble: tuple[float, ...]
    free: tuple[float, tuple[float, ...]]
    lockstep: tuple[float, tuple[float, ...]]
    loss: float


def pipelined(devices: list[list[Event]], ranks: list[int], scopes: Mapping[str, str], table: Table) -> Pipelined:
    """ranks: of the devices. Raises ValueError where a device did not do what the table says."""
    letters = ["".join(re.findall("[FBIW]", name)) for name in table.actions]
    of_devices = [spans(events, scopes) for events in devices]
    # From the first to the last of any device: their clocks are one.
    ticks = max(end for _, (_, end) in of_devices) - min(begin for _, (begin, _) in of_devices)
    costs: dict[tuple[int, int], list[float]] = {}
    of_loss, acting = [], {rank: [] for rank in ranks}
    for rank, (found, _) in zip(ranks, of_devices, strict=True):
        acted = [span for span in found if span.kind != LOSS and letters[span.kind]]
        expected = [kind for kind in table.action[:, rank] if letters[kind]]
        if [span.kind for span in acted] != expected:
            raise ValueError(f"rank {rank} ran {len(acted)} actions where its schedule has {len(expected)}, or others")
        for span in acted:
            costs.setdefault((span.kind, rank), []).append((span.end - span.start) / 1e6)
        of_loss.append(sum(span.end - span.start for span in found if span.kind == LOSS))
        acting[rank].append(sum(span.end - span.start for span in acted))
    mean = {
        name: float(np.mean([ms for (kind, _), of in costs.items() if letters[kind] == name for ms in of])) for name in set(letters) - {""}
    }
    loss = float(np.mean(of_loss)) / 1e6
    took = ticks / 1e6 - loss
    free = simulate(table.schedule, {"I": math.nan, "W": math.nan} | mean)
    of_ticks = np.array([[np.mean(costs.get((kind, rank), 0.0)) for rank, kind in enumerate(row)] for row in table.action])
    lockstep = float(of_ticks.max(axis=1).sum())
    return Pipelined(
        mean,
        took,
        tuple(took - float(np.mean(acting[rank])) / 1e6 for rank in sorted(acting)),
        (free.makespan, free.bubble),
        (lockstep, tuple((lockstep - of_ticks.sum(axis=0)).tolist())),
        loss,
    )


def measured_times(events: list[Event], text: str, slower: float) -> str:
    """A GPU's events as the profile that XLA schedules by (xla_gpu_pgle_profile_file_or_directory_path). text: the compiled program.

    All-to-alls do not run under the names that they are scheduled by: a large one gets the median of NCCL's kernels of more than 1 ms, by
    its bytes, times `slower`, since beside products they take longer.
    """
    of_ops: dict[str, list[Event]] = {}
    for event in events:
        if event.op:
            of_ops.setdefault(event.op, []).append(event)
    lines = []
    for op, kernels in of_ops.items():
        executions = len(kernels) / len({event.name for event in kernels})
        us = sum(event.end - event.start for event in kernels) / 1e3 / executions
        lines.append(f'costs {{ name: "{op}" cost_us: {us:.1f} }}')
    sends = [(event.end - event.start) / 1e3 for event in events if event.sends and event.end - event.start > 1e6]
    starts, ends = {}, {}
    for line in text.splitlines():  # those with a kernel are hundreds of kilobytes long: a regular expression for others alone
        if "all-to-all-start(" in line[:2000] and (found := re.search(r"%?([\w.-]+) = (\(.*?\)) all-to-all-start\(", line)):
            starts[found[1]] = found[2]
        elif "all-to-all-done(" in line[:2000] and (found := re.search(r"%?([\w.-]+) = .*? all-to-all-done\(.*?%?([\w.-]+)\)", line)):
            ends[found[2]] = found[1]
    entries = {
        start: max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", shape)) for start, shape in starts.items()
    }
    large = {start: count for start, count in entries.items() if count > 1e6}
    for start, count in large.items():
        us = slower * np.median(sends) * count / np.median(list(large.values()))
        lines.append(f'costs {{ name: "{start}" cost_us: {us:.1f} }}')
        lines.append(f'latencies {{ source: "{start}" target: "{ends[start]}" latency_us: {us:.1f} }}')
    return "\n".join(lines)


def busy(devices: list[list[tuple[float, float, str, bool]]]) -> dict[str, Busy]:
    """`profile` from each device's kernels, as `kernels_of` gives them."""
    found = {}
    for group in sorted({group for kernels in devices for _, _, group, _ in kernels}):
        rows = []
        for kernels in devices:
            computing = _union([(start, end) for start, end, _, sends in kernels if not sends])
            sending = _union([(start, end) for start, end, g, sends in kernels if sends and g == group])
            running = _union([(start, end) for start, end, g, _ in kernels if g == group])
            rows.append([_length(sending), _length(sending) - _overlap(sending, computing), _length(running)])
        found[group] = Busy(*np.mean(rows, axis=0) / 1e6)
    return found


def kernels_of(events, group_of) -> list[tuple[float, float, str, bool]]:
    """(start, end in nanoseconds, group, whether it communicates) of everything that ran on the device's streams, in order of the start.

    What runs asynchronously is not always told to be of a known operation: it counts to the group of what was started before it.
    """
    found, group = [], ""
    for event in events:
        if event.op and (known := group_of(event.op)) is not None:
            group = known
        found.append((event.start, event.end, group, event.sends))
    return found


def _union(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _length(intervals) -> float:
    return sum(end - start for start, end in intervals)


def _overlap(a, b) -> float:
    """Time in which both of two unions run."""
    return _length(a) + _length(b) - _length(_union([*a, *b]))
