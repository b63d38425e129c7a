"""The supervisor: its decisions, with processes that compute nothing, and real runs whose processes are killed and stopped at random."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax import checkpoint
from dsv3_jax.config import TrainConfig
from dsv3_jax.errors import UserError
from dsv3_jax.training import supervisor
from tests.micro import write_recipe

ROOT = Path(__file__).parents[2]

# A process that notes how it was started, waits for the others, and then does what a test says.
PROCESS = """
import json, os, signal, sys, time
folder, body, *rest = sys.argv[1:]
options = dict(zip(rest[::2], rest[1::2]))
index, gpu, number = int(options["--process-id"]), int(os.environ["JAX_LOCAL_DEVICE_IDS"]), int(options["--num-processes"])
saved = lambda: os.path.exists(folder + "/3/checksums.json")
was_saved = saved()
log = os.open(folder + "/starts", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(log, (json.dumps([options["--coordinator"], gpu, options.get("--resume")]) + "\\n").encode())
while open(folder + "/starts").read().count(options["--coordinator"]) < number:
    time.sleep(0.01)
def save(step=3):
    os.makedirs(f"{folder}/{step}")
    open(f"{folder}/{step}/checksums.json", "w").close()
def lost(how):
    os.kill(os.getpid(), how)
    time.sleep(60)
exec(body)
"""


def supervised(folder, body, num_processes=3, min_processes=None):
    """(what the supervisor returns, for each start: the GPUs and --resume of its processes). Batches of 8 over data=-1."""
    command = [sys.executable, "-S", "-c", PROCESS, str(folder), body]
    status = supervisor.run(command, TrainConfig(workdir=str(folder)), num_processes, min_processes or num_processes, 1)
    return status, starts(folder)


def starts(folder):
    found = {}
    for address, gpu, resume in map(json.loads, (folder / "starts").read_text().splitlines()):
        found.setdefault(address, []).append((gpu, resume))
    return [(sorted(gpu for gpu, _ in started), {resume for _, resume in started}) for started in found.values()]


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "SIGSEGV"])
@pytest.mark.parametrize("process", [0, 2])
def test_a_lost_process_starts_all_again(tmp_path, capsys, how, process):
    """From what was saved. The others, which would wait for it, are ended."""
    body = f"if not was_saved:\n if index == {process}: save(); lost(signal.{how})\n time.sleep(60)"
    began = time.monotonic()
    status, started = supervised(tmp_path, body)
    assert status == 0 and started == [([0, 1, 2], {None}), ([0, 1, 2], {"auto"})]
    assert time.monotonic() - began < 50  # nobody was waited for
    said = capsys.readouterr().err
    assert f"process {process} of 3 was {'stopped' if how == 'SIGSTOP' else 'killed'} ({how})" in said
    assert "starting 3 processes from step 3" in said


def test_the_cause_is_named_and_not_its_echo(tmp_path, capsys):
    """The others abort when they lose one, or take it for wrong input."""
    body = """if not was_saved:
        if index == 2:
            open(folder + "/pid", "w").write(str(os.getpid()))
            save()
            lost(signal.SIGKILL)
        while not saved(): time.sleep(0.01)
        stat = f"/proc/{open(folder + '/pid').read()}/stat"
        while os.path.exists(stat) and ") Z " not in open(stat).read(): time.sleep(0.01)
        os.abort() if index else sys.exit(2)"""
    status, started = supervised(tmp_path, body)
    assert status == 0 and len(started) == 2
    assert "process 2 of 3 was killed (SIGKILL)" in capsys.readouterr().err


def test_wrong_input_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.5)
    assert supervised(tmp_path, "time.sleep(60) if index else sys.exit(2)") == (2, [([0, 1, 2], {None})])


def test_what_never_comes_up_is_given_up(tmp_path):
    with pytest.raises(UserError, match=r"lost 3 times before a new checkpoint.*status 1"):
        supervised(tmp_path, "1 / 0")
    assert len(starts(tmp_path)) == 3


def test_a_run_that_saves_between_its_losses_goes_on(tmp_path):
    body = """done = sum(name.isdigit() for name in os.listdir(folder))
if done < 4:
    if index == 0: save(done + 1); lost(signal.SIGKILL)
    time.sleep(60)"""
    status, started = supervised(tmp_path, body, num_processes=2)
    assert status == 0 and started == [([0, 1], {None})] + [([0, 1], {"auto"})] * 4


def test_fewer_processes_without_the_lost_gpu(tmp_path):
    """Batches of 8 divide over 2 processes and not over 3."""
    status, started = supervised(tmp_path, "if gpu == 1: lost(signal.SIGKILL)", num_processes=4, min_processes=2)
    assert status == 0 and started == [([0, 1, 2, 3], {None})] * 3 + [([0, 2], {None})]


def test_a_signal_to_stop_is_handed_on(tmp_path):
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\ntime.sleep(60)"

    def stop():
        while not (tmp_path / "starts").exists() or len((tmp_path / "starts").read_text().splitlines()) < 3:
            time.sleep(0.1)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert supervised(tmp_path, body) == (143, [([0, 1, 2], {None})])


# Real runs: four processes of one CPU device each, a checkpoint every three steps.


class Supervised:
    """A run of train.py --supervise 4 in the background."""

    def __init__(self, recipe, folder, *options):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        argv = [sys.executable, "train.py", recipe, "--workdir", str(folder), "--supervise", "4", *options]
        self.folder, self.output = folder, folder.with_suffix(".txt")
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def said(self):
        """What the supervisor has printed."""
        return [line for line in self.output.read_text().splitlines() if line.startswith("supervisor: ")]

    def step(self, since=0.0):
        """The last step in the metrics, 0 where none was written after the time `since`."""
        metrics = self.folder / "metrics.jsonl"
        if not metrics.exists() or metrics.stat().st_mtime <= since:
            return 0
        return max((int(n) for n in re.findall(r'^{"step": (\d+),.*}$', metrics.read_text(), re.M)), default=0)

    def wait_until(self, condition, seconds=300.0):
        """Seconds until it held."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() < began + seconds and self.process.poll() is None, self.output.read_text()[-4000:]
            time.sleep(0.02)
        return time.monotonic() - began

    def processes(self):
        """Process number -> pid of those that run."""
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "--process-id" in argv:
                found[int(argv[argv.index("--process-id") + 1])] = int(pid)
        return found

    def lose(self, index, how):
        """Sends a process the signal; returns (seconds until the supervisor noticed, the step complete before, the step gone on from)."""
        self.wait_until(lambda: len(self.processes()) == 4)
        before, said = (checkpoint.complete_steps(self.folder) or [0])[-1], len(self.said())
        os.kill(self.processes()[index], how)
        noticed = self.wait_until(lambda: len(self.said()) >= said + 2)
        assert f"process {index} of 4 was" in self.said()[said], self.said()
        started = re.search(r"from step (\d+)|anew", self.said()[said + 1])
        return noticed, before, int(started[1] or 0)

    def finish(self):
        assert self.process.wait(600) == 0, self.output.read_text()[-4000:]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return str(write_recipe(tmp_path_factory.mktemp("supervised"), steps=80, batch_size=8, checkpoint_every=3, eval_every=1000))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of a run that lost no process."""
    run = Supervised(recipe, tmp_path_factory.mktemp("runs") / "whole")
    run.finish()
    assert not run.said()
    return run.folder


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim, how", [("worker", signal.SIGKILL), ("coordinator", signal.SIGKILL), ("any", signal.SIGSTOP)])
def test_ten_losses_at_random(whole, recipe, tmp_path, victim, how):
    """Two of them while the processes start. Noticed within a minute, nothing complete is lost, and the end is that of the whole run."""
    rng, run, noticed, again = random.Random(f"{victim} {how}"), Supervised(recipe, tmp_path / "run"), [], []
    started_from, since = 0, 0.0
    for loss in range(10):
        if loss % 5 == 3:
            run.wait_until(lambda: len(run.processes()) == 4)
            time.sleep(rng.uniform(0, 6))
        else:
            after = started_from + rng.randint(7, 9)
            again.append(run.wait_until(lambda after=after, since=since: run.step(since) >= after))
            time.sleep(rng.uniform(0, 0.2))
        index = {"worker": rng.randint(1, 3), "coordinator": 0, "any": rng.randint(0, 3)}[victim]
        seconds, complete, started_from = run.lose(index, how)
        since = time.time()
        assert seconds < 60 and started_from >= complete
        noticed.append(seconds)
        print(f"process {index} lost, noticed after {seconds:.2f} s, gone on from step {started_from} (complete: {complete})", flush=True)
    run.finish()
    print(f"noticed after at most {max(noticed):.2f} s; from a start to the steps after it {min(again):.1f} to {max(again):.1f} s")
    assert_same_step(whole, run.folder)
    assert metrics_of(run.folder) == metrics_of(whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fewer_data_ranks(whole, recipe, tmp_path):
    """Process 3 is lost three times before anything new is saved: the run goes on with two, over which its batches divide."""
    run = Supervised(recipe, tmp_path / "run", "--min-processes", "2")
    run.wait_until(lambda: run.step() >= 30)
    for _ in range(3):
        run.lose(3, signal.SIGKILL)
    run.wait_until(lambda: "starting 2 processes" in run.said()[-1])
    run.finish()
    assert "data=2, pipe=1, expert=1" in run.output.read_text()
    losses = [[line["loss"] for line in metrics_of(folder) if "loss" in line] for folder in (whole, run.folder)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.slow
def test_a_pipeline_over_processes(tmp_path):
    """Two ranks in two processes: every rank gets all rows, and the first reads metrics of both."""
    recipe = str(write_recipe(tmp_path, steps=3, batch_size=8, checkpoint_every=3, eval_every=1000))
    options = ["--mesh", "pipe=2", "--pipeline-schedule", "1f1b", "--model.num-hidden-layers", "4"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    for name, processes in (("one", ["--fake-devices", "2"]), ("two", ["--supervise", "2"])):
        argv = [sys.executable, "train.py", recipe, *options, *processes, "--workdir", str(tmp_path / name)]
        subprocess.run(argv, cwd=ROOT, env=environment, check=True)
    assert metrics_of(tmp_path / "two") == metrics_of(tmp_path / "one")
    assert_same_step(tmp_path / "one", tmp_path / "two")


def assert_same_step(a, b):
    a, b = checkpoint.open_run(a), checkpoint.open_run(b)
    assert a.step == b.step
    for item in ("params", "train_state"):
        for u, v in zip(jax.tree.leaves(a.params(item=item)), jax.tree.leaves(b.params(item=item)), strict=True):
            assert np.asarray(u).tobytes() == np.asarray(v).tobytes()
