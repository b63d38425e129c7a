"""Processes on this machine that are started again when one of them is lost: `python train.py RECIPE --supervise N`.

The supervisor computes nothing. It starts one process a GPU and watches them; where one dies or is stopped, it ends all and starts them
from the last complete checkpoint: what is lost are the steps since then. Wrong input is not tried again. Across machines the cluster's
scheduler does this (docs/parallel.md).
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from dsv3_jax import checkpoint
from dsv3_jax.command_line import INTERRUPTED, WRONG_INPUT
from dsv3_jax.config import TrainConfig
from dsv3_jax.errors import UserError
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.training import loop, pipeline

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 2.0  # after one process reports wrong input: it may be the echo of another's death
_TRIES = 3  # starts in a row that save nothing new, before the process that was lost last is given up
_TERMINATED = 128 + signal.SIGTERM  # status of train.py


class Lost(NamedTuple):
    """A process that died or was stopped. echo: in a way in which processes die because another one has."""

    echo: bool
    process: int
    fate: str


def run(command: list[str], config: TrainConfig, num_processes: int, min_processes: int, devices_each: int) -> int:
    """Runs `command` in so many processes until they are done; returns their exit status.

    command: without what tells the processes apart, which is appended. min_processes: a process that is lost in `_TRIES` starts in a row is
    left out, and its GPU, while so many remain and the mesh and the batch divide over them. devices_each: devices of a process.
    Raises UserError where processes are lost again and again before anything new is saved.
    """
    directory, gpus = Path(config.workdir), list(range(num_processes))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}): give a --workdir that can be written") from error
    at_first = saved = _saved(directory)
    tries = 0
    with loop.stop_signals() as stop:
        while True:
            # What this run has saved is gone on with; before that, the user's own --resume holds.
            resume = ["--resume", "auto"] if saved - at_first else []
            workers = _start(command, resume, gpus, directory)
            try:
                lost = _watch(workers, stop)
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()
            if lost is None:
                return max(worker.returncode for worker in workers)
            _say(f"process {lost.process} of {len(gpus)} {lost.fate}")
            if stop:
                return 128 + stop[0]
            saved, before = _saved(directory), saved
            tries = 1 if saved - before else tries + 1
            if tries == _TRIES:
                fewer = _fewer(config, len(gpus) - 1, min_processes, devices_each)
                if fewer is None:
                    raise UserError(
                        f"a process was lost {_TRIES} times before a new checkpoint, the last one {lost.fate}: look at what it printed"
                    )
                del gpus[lost.process]
                gpus, tries = gpus[:fewer], 0
            step = max((step for step, _ in saved), default=None)
            _say(f"starting {len(gpus)} processes " + ("anew" if step is None else f"from step {step}"))


def _start(command: list[str], resume: list[str], gpus: list[int], directory: Path) -> list[subprocess.Popen]:
    """A process for each GPU. The first writes to the terminal, the others to logs in the run folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    workers = []
    for i, gpu in enumerate(gpus):
        argv = [*command, "--coordinator", address, "--num-processes", str(len(gpus)), "--process-id", str(i), *resume]
        with open(directory / f"process-{i}.log", "a") if i else contextlib.nullcontext() as log:
            worker = subprocess.Popen(
                argv,
                env=os.environ | {"JAX_LOCAL_DEVICE_IDS": str(gpu)},
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C goes to the supervisor, which tells them
            )
        workers.append(worker)
    return workers


def _watch(workers: list[subprocess.Popen], stop: list[int]) -> Lost | None:
    """Until all are done (None) or one is lost. A signal to stop is handed on."""
    told, wrong_input_since = False, None
    while True:
        if stop and not told:
            told = True
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
        lost = [lost for i, worker in enumerate(workers) if (lost := _lost(i, worker))]
        if lost:
            return min(lost)
        codes = [worker.poll() for worker in workers]
        if None not in codes:
            return None
        if WRONG_INPUT in codes:
            wrong_input_since = wrong_input_since or time.monotonic()
            if time.monotonic() > wrong_input_since + _GRACE_SECONDS:
                return None
        time.sleep(_POLL_SECONDS)


def _lost(index: int, worker: subprocess.Popen) -> Lost | None:
    code = worker.poll()
    if code is None:
        stopped = os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        return Lost(False, index, f"was stopped ({signal.Signals(stopped.si_status).name})") if stopped else None
    if code in (0, WRONG_INPUT, INTERRUPTED, _TERMINATED):
        return None
    if code < 0:
        return Lost(code == -signal.SIGABRT, index, f"was killed ({signal.Signals(-code).name})")
    return Lost(True, index, f"ended with status {code}")


def _fewer(config: TrainConfig, most: int, least: int, devices_each: int) -> int | None:
    """The largest number of processes from `most` down to `least` over which mesh and batch divide; None if there is none."""
    for number in range(most, max(least, 1) - 1, -1):
        with contextlib.suppress(UserError):
            pipeline.check_mesh(config, meshes.resolve(config.mesh, number * devices_each))
            return number
    return None


def _saved(directory: Path) -> set[tuple[int, int]]:
    """Complete steps, and when each was completed: a step may be made anew."""
    return {(step, (directory / str(step) / checkpoint.CHECKSUMS).stat().st_mtime_ns) for step in checkpoint.complete_steps(directory)}


def _say(text: str) -> None:
    print(f"supervisor: {text}", file=sys.stderr, flush=True)
