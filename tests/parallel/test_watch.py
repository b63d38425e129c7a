"""A process that waits too long ends and names the one that it waits for."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel import watch
from tests.micro import write_corpus

ROOT = Path(__file__).parents[2]
WAIT = """
import sys, time
from pathlib import Path
from dsv3_jax.parallel.watch import Watch
others = [Watch(Path(sys.argv[1]), process, 3, 60, f"pipe={process}") for process in (1, 2)]
for other, doing in zip(others, sys.argv[2:]):
    other._note(doing)
with Watch(Path(sys.argv[1]), 0, 3, 1, "pipe=0").waiting("step 7"):
    pass
print("went on", flush=True)
with Watch(Path(sys.argv[1]), 0, 3, 1.6, "pipe=0").waiting("step 8"):  # beyond the first one's time, of which nothing must be left
    time.sleep(30)
"""


@pytest.mark.parametrize(
    "doing, message",
    [
        (["waiting in step 8", "after step 7"], r"process 2 \(pipe=2\) was last seen after step 7, \d+ s ago"),
        (
            ["waiting in saving step 7", "before its first step"],
            r"process 1 .* waiting in saving step 7, .*; process 2 .* before its first step, .*",
        ),
        (["waiting in step 8", "waiting in step 8"], r"so do all 3 processes: their devices or the links between them did not finish"),
    ],
)
def test_who_is_missing(tmp_path, doing, message):
    command = [sys.executable, "-c", WAIT, str(tmp_path), *doing]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (watch.STATUS, "went on\n"), done.stderr
    said = rf"error: process 0 \(pipe=0\) waited \d+ s in step 8: {message}; start the run again .*\n"
    assert re.fullmatch(said, done.stderr), done.stderr


def test_who_was_seen_longest_ago_comes_first(tmp_path):
    processes = [watch.Watch(tmp_path, process, 6, 60, "data=0") for process in range(6)]
    for process in (3, 5, 1, 4, 2):
        processes[process]._note("after step 7")
        time.sleep(0.01)
    said = processes[0]._others("step 8")
    assert re.findall(r"process (\d)", said) == ["3", "5", "1", "4"] and said.endswith("; and 1 more are elsewhere")


def test_place_of_a_process():
    assert watch.place(meshes.make("data=2,pipe=2,expert=2", jax.devices()[:8]), 0) == "data=0..1, pipe=0..1, expert=0..1"


# The run of a command line; process 1 gets stuck over its third batch.
STUCK = """
import sys, time
import train
from dsv3_jax.data.loader import Loader
batches = Loader.batches
def slow(self, *args):
    for i, batch in enumerate(batches(self, *args)):
        if i == 2 and sys.argv[sys.argv.index("--process-id") + 1] == "1":
            time.sleep(1000)
        yield batch
Loader.batches = slow
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_stuck_process_ends_the_run(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    small = "--model.vocab-size 300 --model.hidden-size 32 --model.num-hidden-layers 2 --sequence-length 32 --batch-size 4"
    options = f"tiny {small} --steps 50 --mesh data=2 --workdir {tmp_path / 'run'} --data.corpus {corpus} --max-wait 100".split()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", STUCK, *options, "--coordinator", address, "--num-processes", "2", "--process-id"]
    start = time.monotonic()
    started = [
        subprocess.Popen([*command, str(i)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        (_, error), _ = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    found = re.search(
        r"error: process 0 \(data=0, .*\) waited 10. s in .*: process 1 \(data=1, .*\) was last seen after the meeting after step 2, .*",
        error,
    )
    assert found and started[0].returncode == watch.STATUS, error[-3000:]
    assert started[1].returncode != 0  # its heartbeat misses the first process
    assert time.monotonic() - start < 500
