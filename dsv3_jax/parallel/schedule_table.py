"""A schedule in lockstep, as the table that the pipeline executor reads. numpy only.

Time is cut into ticks. In every tick each rank runs one action, then all ranks exchange the results with their neighbours, and what
arrives is stored for a later tick. Values that wait are kept in rings of a fixed number of slots; who sits where is decided here:

    residuals   written by a forward, read by its backward or its input gradient
    stash       written by an input gradient, read by its weight gradient
    forward[p]  input of chunk p, arrived from its producer
    backward[p] cotangent of the output of chunk p, arrived from its consumer. At the last stage it is there as soon as the forward is
                done: the output loss and its gradient follow at once, in the same tick.

Within a tick reads come before writes, so a slot read for the last time can be written in the same tick. Slots are dealt out by colouring
the intervals from write to last read, first free slot first, which needs no more slots than the most values that wait at one time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dsv3_jax.parallel.schedule import Schedule, parts, simulate

# What a rank may do in a tick. The digit is the chunk, static in each branch of the executor.
ONE_CHUNK = ("idle", "F0", "B0", "I0", "W0")
TWO_CHUNKS = ("idle", "F0", "F1", "B0", "B1", "I0", "I1", "W0", "W1", "F0B1", "F1B0")

# The messages after a tick, in this order in `Table.sends`: outputs and input cotangents of chunk 0 and of chunk 1.
MESSAGES = ("F0", "B0", "F1", "B1")

NONE = -1  # in every column: nothing to read, or nothing to keep

COLUMNS = ("f_microbatch", "f_input", "f_residual", "b_microbatch", "b_input", "b_residual", "b_stash", "w_stash")


@dataclass(frozen=True)
class Table:
    """Columns are int32 [ticks, ranks]; a slot or a microbatch is -1 where there is none. `f_` is the forward of the tick, `b_` its
    backward (whole, or of the input), `w_` its weight gradient.
    """

    schedule: Schedule
    actions: tuple[str, ...]  # those that the schedule uses: each is a branch of the executor
    action: np.ndarray  # index into `actions`
    f_microbatch: np.ndarray  # index in the batch
    f_input: np.ndarray  # slot of forward[p]; -1 at the first stage, whose input is the batch
    f_residual: np.ndarray  # slot to write
    b_microbatch: np.ndarray
    b_input: np.ndarray  # slot of backward[p]
    b_residual: np.ndarray  # slot to read
    b_stash: np.ndarray  # slot to write, for an input gradient
    w_stash: np.ndarray  # slot to read
    keep_forward: np.ndarray  # [ticks, ranks, chunks]: slot of forward[p] for what arrives at the end of the tick
    keep_backward: np.ndarray  # [ticks, ranks, chunks]: slot of backward[p] for what arrives at the end of the tick
    sends: np.ndarray  # bool [ticks, ranks, 4]: which MESSAGES leave the rank for another rank at the end of the tick
    residual_slots: int
    stash_slots: int
    forward_slots: tuple[int, ...]  # per chunk
    backward_slots: tuple[int, ...]  # per chunk

    @property
    def num_ticks(self) -> int:
        return len(self.action)


def make_table(schedule: Schedule) -> Table:
    """Every action in the earliest tick after the ticks of its inputs and of the rank's previous action."""
    lockstep = simulate(schedule, dict.fromkeys(("F", "B", "I", "W", "FB"), 1))
    chunks = schedule.num_chunks
    used = {_name(a) for actions in schedule.actions for a in actions} | {"idle"}
    names = tuple(name for name in (ONE_CHUNK if chunks == 1 else TWO_CHUNKS) if name in used)
    shape = (lockstep.makespan, schedule.num_ranks)

    action = np.zeros(shape, np.int32)
    sends = np.zeros((*shape, len(MESSAGES)), bool)
    column = {name: np.full(shape, NONE, np.int32) for name in COLUMNS}
    keep = {name: np.full((*shape, chunks), NONE, np.int32) for name in ("F", "B")}
    slots = {"residual": 0, "stash": 0, "F": [0] * chunks, "B": [0] * chunks}

    # ticks[rank]["F" | "B" | "W"][p, c]: when it runs; an input gradient counts as the backward, whose output it has
    ticks: list[dict[str, dict]] = []
    for rank, (actions, starts) in enumerate(zip(schedule.actions, lockstep.starts)):
        ticks.append({"F": {}, "B": {}, "W": {}})
        for a, tick in zip(actions, starts):
            action[tick, rank] = names.index(_name(a))
            for name, p, c in parts(a):
                ticks[rank]["B" if name == "I" else name][p, c] = tick

    for rank in range(schedule.num_ranks):
        forward, backward, weight = (ticks[rank][name] for name in ("F", "B", "W"))
        residual, used = colour((forward[x], backward[x], x) for x in forward)
        slots["residual"] = max(slots["residual"], used)
        stash, used = colour((backward[x], weight[x], x) for x in weight)
        slots["stash"] = max(slots["stash"], used)
        for p, c in forward:
            for name, tick in (("f", forward[p, c]), ("b", backward[p, c])):
                column[f"{name}_microbatch"][tick, rank] = schedule.microbatch(p, c)
                column[f"{name}_residual"][tick, rank] = residual[p, c]
        for x in weight:
            column["b_stash"][backward[x], rank] = column["w_stash"][weight[x], rank] = stash[x]

        for p in range(chunks):
            # The cotangent of the last stage's output comes with its own forward.
            after = schedule.consumer(rank, p)
            inputs = [("B", "b_input", backward, after or (rank, p), "B" if after else "F")]
            if before := schedule.producer(rank, p):
                inputs.append(("F", "f_input", forward, before, "F"))
            for kind, read, reads, (peer, peer_chunk), message in inputs:
                sent = {c: ticks[peer][message][peer_chunk, c] for c in range(schedule.microbatches_per_chunk)}
                place, used = colour((sent[c], reads[p, c], c) for c in sent)
                slots[kind][p] = max(slots[kind][p], used)
                for c, tick in sent.items():
                    keep[kind][tick, rank, p] = column[read][reads[p, c], rank] = place[c]
                    if peer != rank:
                        sends[tick, peer, MESSAGES.index(f"{message}{peer_chunk}")] = True

    return Table(
        schedule=schedule,
        actions=names,
        action=action,
        sends=sends,
        keep_forward=keep["F"],
        keep_backward=keep["B"],
        residual_slots=slots["residual"],
        stash_slots=slots["stash"],
        forward_slots=tuple(slots["F"]),
        backward_slots=tuple(slots["B"]),
        **column,
    )


def columns_of_ranks(table: Table) -> dict[str, np.ndarray]:
    """The table as the executor reads it, columns [ticks, ranks, ...]: slots of both chunks as places in one ring, nowhere as one after
    the last."""
    chunk = np.arange(table.schedule.num_chunks)
    of_actions = np.array([[int(name[name.index(letter) + 1]) if letter in name else 0 for name in _letters(table)] for letter in "FB"])
    f_chunk, b_chunk = of_actions[:, table.action]
    forward_first, backward_first = (np.cumsum([0, *slots])[:-1] for slots in (table.forward_slots, table.backward_slots))

    def place(slot, offset, slots):
        return np.where(slot == NONE, slots, slot + offset).astype(np.int32)

    def of_chunks(slot, of_action, slots):  # [ticks, ranks, chunks]
        return np.where(of_action[..., None] == chunk, slot[..., None], slots).astype(np.int32)

    forward_slots, backward_slots = sum(table.forward_slots), sum(table.backward_slots)
    return {
        "action": table.action,
        "f_microbatch": np.maximum(table.f_microbatch, 0),
        "b_microbatch": np.maximum(table.b_microbatch, 0),
        "f_first": (table.f_input == NONE) & (table.f_microbatch != NONE),
        "f_input": place(table.f_input, forward_first[f_chunk], forward_slots),
        "b_input": place(table.b_input, backward_first[b_chunk], backward_slots),
        "f_residual": of_chunks(place(table.f_residual, 0, table.residual_slots), f_chunk, table.residual_slots),
        "b_residual": place(table.b_residual, 0, table.residual_slots),
        "b_stash": of_chunks(place(table.b_stash, 0, table.stash_slots), b_chunk, table.stash_slots),
        "w_stash": place(table.w_stash, 0, table.stash_slots),
        "keep_forward": place(table.keep_forward, forward_first[chunk], forward_slots),
        "keep_backward": place(table.keep_backward, backward_first[chunk], backward_slots),
    }


def _letters(table: Table) -> list[str]:
    """The actions, an input gradient counting as the backward it is the first half of."""
    return [name.replace("I", "B") for name in table.actions]


def columns_of_all(table: Table) -> dict[str, np.ndarray]:
    """What all ranks do together, columns [ticks, ...]. loss_microbatch int32 [ticks, chunks]: the microbatch whose forward ends at the
    last stage of the chunk, or NONE; sends: whether any rank sends to another."""
    schedule, ends = table.schedule, np.full((table.num_ticks, table.schedule.num_chunks), NONE, np.int32)
    for p in range(schedule.num_chunks):
        for last in (rank for rank in range(schedule.num_ranks) if schedule.consumer(rank, p) is None):
            runs = np.array([f"F{p}" in name for name in table.actions])[table.action[:, last]]
            ends[runs, p] = table.f_microbatch[runs, last]
    return {"loss_microbatch": ends, "sends": table.sends.any(axis=(1, 2))}


def _name(action: tuple) -> str:
    return "".join(f"{name}{p}" for name, p, _ in parts(action))


def colour(intervals: Iterable[tuple[int, int, object]]) -> tuple[dict, int]:
    """Slots for (written, last read, key): no two that wait at the same time share one. Returns key -> slot and the number of slots."""
    slots: dict[object, int] = {}
    free_from: list[int] = []  # per slot: the tick from whose end it can be written again
    for written, read, key in sorted(intervals, key=lambda interval: interval[0]):
        slot = next((s for s, free in enumerate(free_from) if free <= written), len(free_from))
        free_from[slot : slot + 1] = [read]
        slots[key] = slot
    return slots, len(free_from)
