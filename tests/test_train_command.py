"""The command: its errors, its help, stopping it and killing it, and the notebook on its run."""

import importlib.util
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import nbclient
import nbformat
import numpy as np
import pytest

from dsv3_jax import checkpoint
from tests.micro import one_device, write_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The path of a recipe of a run of seconds."""
    path = write_recipe(tmp_path_factory.mktemp("recipe"), steps=60, batch_size=4, checkpoint_every=20, eval_every=20)
    (path.parent / "corpus" / "latin1.py").write_bytes("# caf\u00e9".encode("latin-1"))
    return str(path)


@pytest.fixture(scope="module")
def environment():
    return one_device()


def start(argv, environment):
    return subprocess.Popen(
        [sys.executable, "train.py", *argv], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, status=0):
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


def wait_for_step(folder, step, process, since=0.0):
    """Until this process, started at the time `since`, has written the metrics of `step`; a killed one may have got further before."""
    metrics = folder / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime > since and f'{{"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"it ended before step {step}: {process.stdout.read()}")


def assert_same_step(a, b):
    a, b = checkpoint.open_run(a), checkpoint.open_run(b)
    assert a.step == b.step
    for item in ("params", "train_state"):
        for u, v in zip(jax.tree.leaves(a.params(item=item)), jax.tree.leaves(b.params(item=item))):
            assert np.asarray(u).tobytes() == np.asarray(v).tobytes()


@pytest.fixture(scope="module")
def whole(recipe, environment, tmp_path_factory):
    """A run that was never stopped: (its folder, its output)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, finish(start([recipe, "--workdir", str(folder)], environment))


def test_output_of_a_run(whole, recipe):
    """Loss and each of its terms, speed, balance, time left; at the end bits per byte beside gzip's, a sample, what to do next."""
    folder, output = whole
    for words in (
        "left out of the corpus, as they are not UTF-8: 1 documents",
        "step 60/60",
        "= main ",
        "mtp ",
        "balance ",
        "load max/mean ",
        "tokens/s",
        "left",
        "bits per byte (gzip -9 of the same",
    ):
        assert words in output
    assert "sample:\n" in output
    assert f"python train.py {shlex.quote(recipe)} --workdir {folder}" in output and f"python serve.py {folder} --prompt" in output


def test_the_notebook_runs_from_top_to_bottom(whole, monkeypatch):
    monkeypatch.setenv("RUN", str(whole[0]))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plot is missing"
    assert any("bits" in output.get("text", "") for output in outputs)


def test_sigterm_saves_and_the_same_command_goes_on(whole, recipe, environment, tmp_path):
    argv = [recipe, "--workdir", str(tmp_path / "run")]
    process = start(argv, environment)
    wait_for_step(tmp_path / "run", 3, process)
    process.terminate()
    output = finish(process, status=128 + signal.SIGTERM)
    steps = checkpoint.complete_steps(tmp_path / "run")
    assert f"stopped by SIGTERM after step {steps[-1]}" in output and shlex.join(["python", "train.py", *argv]) in output
    assert 3 <= steps[-1] < 60
    again = finish(start(argv, environment))
    assert_same_step(whole[0], tmp_path / "run")
    held_out = next(line for line in whole[1].splitlines() if "bits per byte" in line)
    assert held_out in again


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kill_9_at_random_moments(recipe, environment, tmp_path):
    """Saving after every step, killed twenty-five times, start-up and saves included: nothing complete is ever lost or changed."""
    folder, rng, latest, mid_save = tmp_path / "run", random.Random(0), 0, 0
    argv = [recipe, "--steps", "300", "--workdir", str(folder), "--checkpoint-every", "1"]
    for kill in range(25):
        since, process = time.time(), start(argv, environment)
        if while_it_starts := kill % 5 == 4:
            time.sleep(rng.uniform(0, 6))
        else:
            wait_for_step(folder, latest + 1, process, since)
            time.sleep(rng.uniform(0, 1.5))
        assert process.poll() is None, "it came to its end: give it more steps"
        process.kill()
        process.communicate()
        mid_save += not while_it_starts and any(not (d / checkpoint.CHECKSUMS).exists() for d in folder.glob("[0-9]*"))
        steps = checkpoint.complete_steps(folder)
        if steps:
            checkpoint.open_run(folder).verify()
            assert checkpoint.open_run(folder).load({"data": {"step": 0, "row": 0, "rows": ""}})["data"]["step"] == steps[-1]
        assert (steps or [0])[-1] >= latest
        latest = (steps or [0])[-1]
    assert mid_save >= 5
    print(f"25 kills up to step {latest}, {mid_save} of them during a save")
    finish(start([*argv[:-1], "100"], environment))  # it saves less often from here on
    finish(start([recipe, "--steps", "300", "--workdir", str(tmp_path / "whole")], environment))
    assert_same_step(tmp_path / "whole", folder)


@pytest.fixture(scope="module")
def command_module():
    spec = importlib.util.spec_from_file_location("train_command", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_command"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(command_module, capsys):
    """A function: (status, what is on stdout, what is on stderr) of the command, run in this process."""
    return lambda argv: (command_module.main(argv), *capsys.readouterr())


TEXT = ["--data.corpus", "{tmp}/text", "--data.heldout-fraction", "0.2"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["tinny"], "unknown recipe 'tinny' (did you mean 'tiny'?)"),
        (["nowhere/mine.py"], "unknown recipe 'nowhere/mine.py'"),
        (["{tmp}/no_function.py"], "has no attribute 'recipe'): it needs a function recipe()"),
        (["{tmp}/fails.py"], "fails.py fails (line 2: ZeroDivisionError: division by zero)"),
        (["{tmp}/syntax.py"], "syntax.py fails (SyntaxError: "),
        (["--model.hiden-size", "3"], "unknown option --model.hiden-size (did you mean 'model.hidden-size'?)"),
        (["--step", "3"], "unknown option --step (did you mean 'steps'?)"),
        (["tiny", "--steps", "many"], "--steps"),
        (["tiny", "--steps"], "Missing value for argument '--steps'"),
        (["tiny", "--steps", "0"], "steps=0 must be at least 1"),
        (["tiny", "small"], "small"),
        (["--precision", "fp9"], "invalid choice 'fp9'"),
        (["--model.topk-group", "9"], "topk_group=9 must lie in"),
        (["--mesh", "data=3", "--dry-run"], "mesh 'data=3' does not match the devices: there are 8"),
        (["--mesh", "dta=8", "--dry-run"], "unknown mesh axis 'dta' (did you mean 'data'?)"),
        (["--mesh", "data=8", "--batch-size", "12", "--workdir", "{tmp}/run"], "batch_size=12"),
        (["--mesh", "data=8", "--batch-size", "12", "--dry-run"], "batch_size=12"),
        (["--batch-size", "100000000000", "--workdir", "{tmp}/run"], "and this machine has "),
        (["--sequence-length", "512", "--workdir", "{tmp}/run"], "sequence_length=512 is more than model.max_position_embeddings=256"),
        (["--data.corpus", "nowhere", "--workdir", "{tmp}/run"], "the corpus nowhere does not exist"),
        (["--data.corpus", "{tmp}/empty", "--workdir", "{tmp}/run"], "has no files"),
        (["--workdir", "{tmp}/file/run"], "cannot write to"),
        (["--resume", "{tmp}/nowhere", "--workdir", "{tmp}/run"], "does not exist"),
        (["--init-from", "{tmp}/empty", "--workdir", "{tmp}/run", *TEXT], "holds no complete checkpoint"),
        (["--model.n-group", "8", "--model.n-routed-experts", "8"], "leaves groups of one expert"),
        (["--aot"], "--aot compiles without running anything: give --dry-run"),
        (["--min-processes", "2"], "give --supervise with it"),
        (["--supervise", "2", "--min-processes", "3"], "--supervise 2 and --min-processes 3: give"),
        (["--supervise", "0"], "--supervise 0: give at least one process"),
        (["--supervise", "2", "--coordinator", "host:1"], "leave --coordinator"),
        (["--supervise", "2", "--process-id", "0"], "leave --coordinator"),
        (["--coordinator", "host", "--num-processes", "2", "--process-id", "0"], "--coordinator 'host' must be HOST:PORT"),
        (["--model.vocab-size", "100", "--workdir", "{tmp}/run", *TEXT], "vocab_size is 100"),
        (["--model.bos-token-id", "7", "--workdir", "{tmp}/run", *TEXT], "bos_token is 0 and model.bos_token_id is 7: give"),
        (["{tmp}/nothing.py"], "returns a NoneType: it must return a dsv3_jax.config.TrainConfig"),
        (["--model.hidden-size", "0"], "hidden_size=0 must be at least 1"),
        (["--model.n-group", "0"], "n_group=0 must be at least 1"),
        (["--model.num-nextn-predict-layers", "-1"], "must be at least 0"),
        (["--optimizer.learning-rate", "nan"], "learning_rate=nan must be at least 0 and finite"),
        (["--data.corpus", "", "--dry-run"], "corpus is empty: name a file or folder"),
        (["--workdir", "", "--dry-run"], "workdir is empty: name a file or folder"),
        (["--data.fim-rate", "2", "--dry-run"], "fim_rate=2.0 must lie in 0..1"),
        (["--data.heldout-fraction", "nan", "--dry-run"], "heldout_fraction=nan must lie in 0..1, 1 excluded"),
        (["--optimizer.mtp-tail-start", "nan"], "mtp_tail_start=nan must be at least 0 and finite"),
        (["--optimizer.beta1", "1"], "beta1=1.0 must lie in 0..1"),
        (["--optimizer.eps", "0"], "eps=0.0 must be more than 0"),
        (["--batch-ramp-end", "2"], "batch_ramp_end=2.0 must lie in 0..1"),
        (["--batch-ramp-from", "0"], "batch_ramp_from=0 must be at least 1"),
        (["--seed", str(2**64)], "must fit into 64 bits"),
        (["--fake-devices", "0", "--dry-run"], "--fake-devices 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "no_function.py").write_text("x = 1\n")
    (tmp_path / "fails.py").write_text("def recipe():\n    return 1 / 0\n")
    (tmp_path / "syntax.py").write_text("def recipe(:\n")
    (tmp_path / "nothing.py").write_text("def recipe():\n    pass\n")
    (tmp_path / "text").mkdir()
    for i in range(50):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text number {i} with some words in it\n" * 200)
    status, _, errors = command([arg.format(tmp=tmp_path) for arg in argv])
    assert status == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors


def test_no_device_is_one_line(command, monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'abacus'\n(set JAX_PLATFORMS='')")

    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    monkeypatch.setattr(jax, "devices", none)
    status, _, errors = command(["--dry-run"])
    assert (status, errors.count("\n")) == (2, 1) and "JAX finds no device with JAX_PLATFORMS='abacus' (Unable" in errors


def test_ctrl_c_ends_at_once(tmp_path):
    """The second one, that is. A save in flight keeps Python from ending, as this thread does."""
    recipe = "import threading\ndef recipe():\n    threading.Thread(target=threading.Event().wait).start()\n    raise KeyboardInterrupt\n"
    (tmp_path / "interrupted.py").write_text(recipe)
    done = subprocess.run([sys.executable, "train.py", str(tmp_path / "interrupted.py")], cwd=ROOT, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_commands_to_go_on(command_module, monkeypatch):
    monkeypatch.delenv("UV", raising=False)
    for options in ([], ["--steps", "7"], ["--steps=7"], ["--resume", "never"], ["--resume=runs/tiny/100", "--steps", "7"]):
        argv = ["tiny", *options, "--workdir", "a b"]
        assert command_module.going_on(argv, 14) == "python train.py tiny --workdir 'a b' --steps 14"
    assert command_module.going_on(["tiny", "--steps", "7", "--resume", "never"]) == "python train.py tiny --steps 7"
    monkeypatch.setenv("UV", "/usr/bin/uv")  # as `uv run` sets it
    assert command_module.going_on([], 14) == "uv run train.py --steps 14"


def test_help_does_not_import_jax(tmp_path):
    """So that it is there at once, and flags can still be set."""
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--model.hidden-size INT" in done.stdout and "--dry-run" in done.stdout
    assert "Recipes: deepseek_v3, moonlight_16b, small, tiny, v2_lite_16b." in done.stdout


def test_a_reader_that_has_enough():
    """As `head`."""
    process = subprocess.Popen([sys.executable, "train.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=300)) == (b"", 141)


def test_dry_run_of_the_671b_model_on_fake_devices(environment):
    argv = ["deepseek_v3", "--dry-run", "--fake-devices", "8", "--mesh", "data=2,expert=4"]
    done = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in ("671,026,419,200 main", "11,610,068,224 MTP only", "data=2, pipe=1, expert=4 (8 devices)", "62,914,560"):
        assert number in done.stdout


def test_overrides_reach_every_level(recipe, command):
    options = ["--model.num-hidden-layers", "4", "--batch_size", "16", "--optimizer.moment-dtype", "float32", "--steps=7"]
    (_, plain, _), (status, output, _) = (
        command([recipe, "--dry-run", "--batch-size", "8"]),
        command([recipe, "--dry-run", *options, "--data.corpus", "a", "b"]),
    )
    assert status == 0 and f"tokens a step: {16 * 32:,}; {16 * 32 * 7:,} in 7 steps" in output
    assert "moments, two of bfloat16" in plain and "moments, two of float32" in output
    count = lambda text: int(text.split()[1].replace(",", ""))  # noqa: E731
    assert count(output) > 1.5 * count(plain)
