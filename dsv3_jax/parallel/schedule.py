"""Pipeline schedules as data: what each pipeline rank does, in which order. numpy and the standard library only.

    schedule = build("dualpipev", num_ranks=8, num_microbatches=20)
    validate(schedule)
    simulate(schedule, {"F": 1, "I": 1, "W": 1, "FB": 3}).bubble
    python -m dsv3_jax.parallel.schedule draw --kind dualpipev --ranks 8 --microbatches 20 --output out.png

An action is a tuple; `p` is the chunk of layers on the rank, `c` counts the microbatches that this chunk has seen:

    ("F", p, c)            forward
    ("B", p, c)            full backward
    ("I", p, c)            backward for the input only; the weight gradients are left for
    ("W", p, c)            the weight gradients
    ("FB", p, c, q, d)     forward of (p, c) overlapped with the full backward of (q, d)

Sources: GPipe (arXiv:1811.06965), 1F1B (PipeDream-Flush, arXiv:2006.09503), ZB-H1 (arXiv:2401.10241; "ZB1P" in the DeepSeek-V3 report),
DualPipe (DeepSeek-V3 report, section 3.2.1, figure 5) and its V-shaped form. `schedule_table` turns a schedule into the executor's table.
"""

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from dsv3_jax import command_line
from dsv3_jax.errors import UserError

Action = tuple[str | int, ...]

KINDS = ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev")


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank, in order: `actions[rank]`.

    `num_microbatches` counts both directions of dualpipe, whose chunk 0 runs rank 0 to last and whose chunk 1, a copy of the model,
    runs last to rank 0. In dualpipev chunk 0 goes down the ranks and chunk 1, the second half of the same model, comes back up.
    """

    kind: str
    num_ranks: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_chunks(self) -> int:
        """Chunks of layers a rank computes with."""
        return 2 if self.kind in ("dualpipe", "dualpipev") else 1

    @property
    def num_stages(self) -> int:
        """Chunks that a microbatch passes through."""
        return 2 * self.num_ranks if self.kind == "dualpipev" else self.num_ranks

    @property
    def microbatches_per_chunk(self) -> int:
        return self.num_microbatches // 2 if self.kind == "dualpipe" else self.num_microbatches

    def microbatch(self, p: int, c: int) -> int:
        """Index in the batch of the c-th microbatch of chunk p: dualpipe's chunk 1 takes the second half of the batch."""
        return c + p * self.microbatches_per_chunk if self.kind == "dualpipe" else c

    def stage(self, rank: int, p: int) -> int:
        """Position of chunk p of `rank` on a microbatch's way, 0 to num_stages - 1."""
        return rank if p == 0 else self.num_stages - 1 - rank

    def producer(self, rank: int, p: int) -> tuple[int, int] | None:
        """(rank, chunk) whose output chunk p of `rank` takes as input; None at the first stage."""
        if self.stage(rank, p) == 0:
            return None
        if self.kind == "dualpipev" and p == 1 and rank == self.num_ranks - 1:
            return rank, 0  # the turn of the V
        return (rank - 1, p) if p == 0 else (rank + 1, p)

    def consumer(self, rank: int, p: int) -> tuple[int, int] | None:
        """(rank, chunk) that takes the output of chunk p of `rank`, and sends back its cotangent; None at the last stage."""
        if self.stage(rank, p) == self.num_stages - 1:
            return None
        if self.kind == "dualpipev" and p == 0 and rank == self.num_ranks - 1:
            return rank, 1
        return (rank + 1, p) if p == 0 else (rank - 1, p)


def build(kind: str, *, num_ranks: int, num_microbatches: int, max_delayed: int | None = None) -> Schedule:
    """The schedule of `kind` ("gpipe", "1f1b", "zb1p", "dualpipe" or "dualpipev").

    max_delayed: how many microbatches' weight gradients a rank may put off at one time, since the operands of each wait in memory; where
    the schedule would put off more, the backward is run whole. None: as many as the schedule says.

    Raises ValueError, naming the nearest valid choice: an unknown kind, no rank, an odd number of ranks or of microbatches for dualpipe,
    or fewer microbatches than fill the pipeline (1f1b, zb1p: one per rank; dualpipe, dualpipev: two per rank).
    """
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}: choose one of {', '.join(KINDS)}")
    if num_ranks < 1:
        raise ValueError(f"{kind} on {num_ranks} ranks: at least {2 if kind == 'dualpipe' else 1} needed")
    if kind == "dualpipe" and num_ranks % 2:
        below = f"{num_ranks - 1} or " if num_ranks > 1 else ""
        raise ValueError(f"dualpipe needs an even number of ranks, not {num_ranks}: use {below}{num_ranks + 1}, or dualpipev")
    minimum = {"gpipe": 1, "1f1b": num_ranks, "zb1p": num_ranks}.get(kind, 2 * num_ranks)
    if num_microbatches < minimum:
        raise ValueError(f"{kind} on {num_ranks} ranks needs at least {minimum} microbatches, not {num_microbatches}: use {minimum}")
    if kind == "dualpipe" and num_microbatches % 2:
        raise ValueError(f"dualpipe needs an even number of microbatches, not {num_microbatches}: use {num_microbatches + 1}")

    def rank_actions(rank):
        if kind == "gpipe":
            return [("F", 0, c) for c in range(num_microbatches)] + [("B", 0, c) for c in range(num_microbatches)]
        if kind == "1f1b":
            return _one_forward_one_backward(num_ranks - rank, num_microbatches, delay=None)
        if kind == "zb1p":
            return _one_forward_one_backward(num_ranks - rank, num_microbatches, delay=rank)
        if kind == "dualpipev":
            return _dualpipe(rank, num_ranks, num_microbatches, down=0)
        from_end = min(rank, num_ranks - 1 - rank)
        return _dualpipe(from_end, num_ranks // 2, num_microbatches // 2, down=int(rank >= num_ranks // 2))

    actions = (rank_actions(rank) for rank in range(num_ranks))
    if max_delayed is not None:
        actions = (_with_few_delayed(of_rank, max_delayed) for of_rank in actions)
    return Schedule(kind, num_ranks, num_microbatches, tuple(map(tuple, actions)))


def _with_few_delayed(actions: list[Action], most: int) -> list[Action]:
    """The same, whole backwards in the place of input gradients whose weight gradients would be one too many to wait."""
    kept: list[Action] = []
    waiting: set[tuple] = set()
    for name, *chunk in actions:
        if name == "I" and len(waiting) < most:
            waiting.add(tuple(chunk))
        elif name == "I":
            name = "B"
        elif name == "W" and tuple(chunk) not in waiting:
            continue  # done by its backward
        elif name == "W":
            waiting.remove(tuple(chunk))
        kept.append((name, *chunk))
    return kept


def _one_forward_one_backward(in_flight: int, count: int, delay: int | None) -> list[Action]:
    """`in_flight` forwards, then backward and forward in turn. With a `delay` the backwards are split, and the weight gradients stay that
    many microbatches behind: a later rank, which has fewer forwards in flight, keeps them longer, so that they fill its idle end."""
    actions: list[Action] = [("F", 0, c) for c in range(in_flight)]
    for c in range(count):
        actions.append(("B" if delay is None else "I", 0, c))
        if delay is not None and c >= delay:
            actions.append(("W", 0, c - delay))
        if c + in_flight < count:
            actions.append(("F", 0, c + in_flight))
    if delay is not None:
        actions += [("W", 0, c) for c in range(count - delay, count)]
    return actions


def _dualpipe(h: int, depth: int, count: int, down: int) -> list[Action]:
    """One rank of DualPipe or DualPipeV, in the eight phases of the published schedule.

    h: distance from the end where the rank's own direction `down` enters. depth: distance of that end from where the two directions meet
    (half the ranks in dualpipe, all in dualpipev). count: microbatches per chunk.
    """
    up = 1 - down
    actions: list[Action] = []
    forwards, backwards = [0, 0], [0, 0]
    owed: deque[tuple[int, int]] = deque()  # inputs done, weight gradients not

    def take(counter, p):
        counter[p] += 1
        return p, counter[p] - 1

    def forward(p):
        actions.append(("F", *take(forwards, p)))

    def backward(p):
        actions.append(("B", *take(backwards, p)))

    def backward_input(p):
        owed.append(take(backwards, p))
        actions.append(("I", *owed[-1]))

    def backward_weight():
        actions.append(("W", *owed.popleft()))

    def forward_and_backward(p, q):
        actions.append(("FB", *take(forwards, p), *take(backwards, q)))

    beyond = depth - h - 1  # ranks between this one and the middle
    for _ in range(2 * beyond):  # 1
        forward(down)
    for _ in range(h + 1):  # 2
        forward(down)
        forward(up)
    for _ in range(beyond):  # 3
        backward_input(up)
        backward_weight()
        forward(up)
    for i in range(count - 2 * depth + h + 1):  # 4, the steady state
        if i == 0 and beyond == 0:  # at the meeting point the first pair is not overlapped: the neighbour waits for this forward
            forward(down)
            backward(up)
        else:
            forward_and_backward(down, up)
        forward_and_backward(up, down)
    for _ in range(beyond):  # 5
        backward(up)
        forward_and_backward(up, down)
    for i in range(2 * (h + 1)):  # 6: the second half leaves its weight gradients for later
        (backward if i <= h else backward_input)(down if i % 2 else up)
    for _ in range(beyond):  # 7
        backward_weight()
        backward_input(down)
    for _ in range(h + 1):  # 8
        backward_weight()
    return actions


def parts(action: Action) -> tuple[Action, ...]:
    """An overlapped action as its forward and its backward; any other as itself."""
    if action[0] == "FB":
        return ("F", *action[1:3]), ("B", *action[3:5])
    return (action,)


def validate(schedule: Schedule) -> None:
    """Raises ValueError unless every microbatch passes every chunk forward, then backward (whole, or its input before its weights),
    exactly once, and the ranks never wait for each other in a circle."""
    chunks = [(p, c) for p in range(schedule.num_chunks) for c in range(schedule.microbatches_per_chunk)]
    for rank, actions in enumerate(schedule.actions):
        done: dict[tuple, str] = {chunk: "" for chunk in chunks}
        for action in actions:
            for name, *chunk in parts(action):
                key = tuple(chunk)
                if key not in done:
                    raise ValueError(f"rank {rank}: {action} is of a chunk or microbatch that does not exist")
                done[key] += name
                if done[key] not in ("F", "FB", "FI", "FIW"):
                    raise ValueError(f"rank {rank}: {action} comes out of order or twice")
        missing = [chunk for chunk in chunks if done[chunk] not in ("FB", "FIW")]
        if missing:
            raise ValueError(f"rank {rank}: chunk {missing[0][0]} of microbatch {missing[0][1]} is never finished")
    simulate(schedule, {"F": 1, "I": 1, "W": 1})


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found, in the unit of its costs; every tuple has one entry per rank."""

    makespan: float
    starts: tuple[tuple[float, ...], ...]  # of each action
    ends: tuple[tuple[float, ...], ...]  # of each action
    busy: tuple[float, ...]
    bubble: tuple[float, ...]  # makespan - busy
    peak_activations: tuple[int, ...]  # chunks whose forward is kept for a backward or a weight gradient to come, at most at one time


def simulate(schedule: Schedule, costs: Mapping[str, float]) -> Simulation:
    """Runs the schedule with free communication: an action starts when the rank is free and its inputs are there.

    costs: time of "F", "I", "W" and, where they differ from the sum, of "B" (I + W) and "FB" (F + B). An action's results are there when
    it ends. Raises ValueError where the ranks wait for each other in a circle.
    """
    costs = {"B": costs["I"] + costs["W"], **costs}
    costs = {"FB": costs["F"] + costs["B"], **costs}
    ready: dict[tuple, float] = {}  # ("F" | "B" | "W", rank, p, c) -> its end; an I counts as the B, whose output it has
    starts: list[list[float]] = [[] for _ in schedule.actions]
    ends: list[list[float]] = [[] for _ in schedule.actions]

    def inputs(rank, name, p, c):
        if name == "W":
            return []  # its I has run on the same rank
        if name == "F":
            source = schedule.producer(rank, p)
            return [("F", *source, c)] if source else []
        target = schedule.consumer(rank, p)
        return [("B", *target, c)] if target else [("F", rank, p, c)]

    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.actions):
            while len(starts[rank]) < len(actions):
                action = actions[len(starts[rank])]
                needs = [key for name, p, c in parts(action) for key in inputs(rank, name, p, c)]
                if not all(key in ready for key in needs):
                    break
                start = max([0, *ends[rank][-1:], *(ready[key] for key in needs)])
                starts[rank].append(start)
                ends[rank].append(start + costs[action[0]])
                for name, p, c in parts(action):
                    ready["B" if name == "I" else name, rank, p, c] = ends[rank][-1]
                progress = True
    for rank, actions in enumerate(schedule.actions):
        if len(starts[rank]) < len(actions):
            raise ValueError(f"deadlock: rank {rank} waits for the input of {actions[len(starts[rank])]} forever")

    makespan = max(end[-1] for end in ends)
    busy = tuple(sum(costs[action[0]] for action in actions) for actions in schedule.actions)
    peaks = tuple(_peak_activations(actions) for actions in schedule.actions)
    return Simulation(makespan, tuple(map(tuple, starts)), tuple(map(tuple, ends)), busy, tuple(makespan - b for b in busy), peaks)


def _peak_activations(actions: tuple[Action, ...]) -> int:
    live = peak = 0
    for action in actions:
        for name, *_ in parts(action):
            live += {"F": 1, "B": -1, "I": 0, "W": -1}[name]
            peak = max(peak, live)
    return peak


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser(prog="python -m dsv3_jax.parallel.schedule", description="Draw a pipeline schedule.")
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw", help="a picture of the schedule, like figure 5 of the DeepSeek-V3 report")
    draw.add_argument("--kind", choices=KINDS, default="dualpipev")
    draw.add_argument("--ranks", type=int, default=8)
    draw.add_argument("--microbatches", type=int, default=20)
    draw.add_argument("--output", required=True, help="file to write, e.g. schedule.png")
    options = parser.parse_args(argv)
    try:
        from dsv3_jax.parallel.schedule_draw import draw

        schedule = build(options.kind, num_ranks=options.ranks, num_microbatches=options.microbatches)
        draw(schedule, simulate(schedule, {"F": 1, "I": 1, "W": 1}), options.output)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    sys.exit(command_line.run(main))
