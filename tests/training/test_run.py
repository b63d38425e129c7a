"""Whole runs: stopped and gone on with, started from another's weights, damaged, diverging."""

import dataclasses
import errno
import functools
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax import checkpoint, hub
from dsv3_jax.config import TrainConfig
from dsv3_jax.errors import UserError
from dsv3_jax.hub.__main__ import to_orbax
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.training import loop, metrics, plot
from dsv3_jax.training.step import Trainer

MODELS = Path(__file__).parents[1] / "data" / "models"


@pytest.fixture(scope="module")
def config(micro_config):
    """Six steps on eight devices, of 8 rows and then 16, with a moving average; a dense layer, and the MTP module, which is a MoE layer.

    One of each is enough: to a run all weights are alike. Runs of tests/test_train_command.py have a MoE layer beside the module.
    """
    base = micro_config(keep_checkpoints=10, mesh="data=8", batch_size=16, batch_ramp_from=8, batch_ramp_end=0.3)
    model = dataclasses.replace(base.model, num_hidden_layers=1)
    return dataclasses.replace(base, model=model, optimizer=dataclasses.replace(base.optimizer, ema_decay=0.9))


@pytest.fixture(scope="module", autouse=True)
def one_trainer():
    """Runs of the same steps trace and load them once: in processes of their own they do not (tests/test_train_command.py).

    What is put in the place of a run's own settings is no part of its program: a step is told its learning rate, and gets its rows.
    """
    made = functools.cache(Trainer)
    others = {"workdir": "anywhere", "resume": "auto", "init_from": None, "max_bad_steps": 3, "batch_ramp_from": None}

    def trainer(decoder, run, mesh):
        optimizer = dataclasses.replace(run.optimizer, learning_rate=1.0, warmup_steps=0)
        return made(decoder, dataclasses.replace(run, optimizer=optimizer, **others), mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", trainer)
        yield


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that was never stopped: (its folder, its result)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, loop.run(dataclasses.replace(config, workdir=str(folder)))


def assert_same_step(a, b, step):
    """Parameters, optimizer, counters, moving average and position in the data, bit for bit."""
    a, b = checkpoint.open_run(a, step), checkpoint.open_run(b, step)
    assert a.items == b.items == ["data", "ema", "params", "train_state"]
    for item in ("params", "train_state", "ema"):
        x, y = a.params(item=item), b.params(item=item)
        assert jax.tree.structure(x) == jax.tree.structure(y)
        for (path, u), v in zip(jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(y)):
            assert np.asarray(u).tobytes() == np.asarray(v).tobytes(), jax.tree_util.keystr(path)
    position = {"data": loop.POSITION}
    assert a.load(position) == b.load(position)


def lines(folder):
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_what_a_run_leaves(whole, config):
    folder, result = whole
    assert (result.step, result.stopped_by) == (6, None)
    assert checkpoint.complete_steps(folder) == [2, 4, 6]
    assert json.loads((folder / "config.json").read_text())["model"]["hidden_size"] == 32
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    steps = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line[name] > 0 for line in steps for name in ("loss", "main", "mtp", "balance", "grad_norm", "learning_rate", "tokens"))
    assert steps[-1]["main"] < steps[0]["main"] == pytest.approx(np.log(300), rel=0.05)  # fresh weights know nothing
    assert steps[0]["tokens"] == 8 * 32 and steps[-1]["tokens"] - steps[-2]["tokens"] == 16 * 32  # the batch ramp
    [held_out, final] = [line for line in lines(folder) if "heldout_loss" in line]
    assert held_out["step"] == 3 and np.shape(held_out["load"]) == (1, 8)
    # Bits per byte are the nats of all held-out tokens over the bytes of the documents.
    assert final["heldout_bits_per_byte"] == result.heldout_bits_per_byte
    tokens = result.prepared.heldout.tokens - result.prepared.heldout.documents  # each but BOS
    expected = final["heldout_loss"] * tokens / np.log(2) / result.prepared.heldout.bytes
    assert result.heldout_bits_per_byte == pytest.approx(expected, rel=1e-6)


def test_tensorboard_events(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole[0] / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("loss")[0].value == pytest.approx(lines(whole[0])[0]["loss"], rel=1e-6)


def test_a_picture(whole, tmp_path, capsys):
    assert plot.main([str(whole[0]), str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_bytes(b"\xff\n")
    for run, output, message in (
        (tmp_path, "none.png", "error: cannot read "),
        (damaged, "none.png", f"error: {damaged / 'metrics.jsonl'} is damaged "),
        (whole[0], "run.what", "error: cannot draw "),
        (whole[0], "nowhere/run.png", "error: cannot draw "),
    ):
        assert plot.main([str(run), str(tmp_path / output)]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(message) and errors.count("\n") == 1


def stop_after(monkeypatch, step):
    """A SIGTERM from outside when the metrics of `step` are written."""
    write = metrics.MetricsLog.write

    def write_and_stop(self, number, values):
        write(self, number, values)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.MetricsLog, "write", write_and_stop)


def test_a_stopped_run_goes_on_bit_for_bit(whole, config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        result = loop.run(config)
    assert result.stopped_by == signal.SIGTERM and 2 <= result.step < 6 and result.heldout_bits_per_byte is None
    assert checkpoint.complete_steps(tmp_path / "run")[-1] == result.step
    again = loop.run(config)
    assert again.step == 6 and again.heldout_bits_per_byte == whole[1].heldout_bits_per_byte
    assert_same_step(whole[0], tmp_path / "run", 6)
    # Nothing is evaluated on the way out, so that line may be missing.
    assert [line for line in lines(tmp_path / "run") if "load" not in line] == [line for line in lines(whole[0]) if "load" not in line]


def modified(folder):
    """When the files of a run were written; its lock and the notes of where its processes are tell of no training."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock" and path.parent.name != "where"]
    return {path: path.stat().st_mtime_ns for path in files}


def test_an_older_step_is_gone_on_with(whole, config, tmp_path):
    """--resume RUN/2: later steps are set aside and made again, the same; a damaged latest step is refused and its file named."""
    folder = tmp_path / "run"
    loop_config = dataclasses.replace(config, workdir=str(folder))
    os.system(f"cp -r {whole[0]} {folder}")
    data = max((folder / "6" / "params").rglob("d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 4
    data.write_bytes(content)
    before = modified(folder)
    with pytest.raises(UserError, match="damaged") as error:
        loop.run(loop_config)
    assert str(data) in str(error.value) and f"{folder / '4'}" in str(error.value)
    assert before == modified(folder)

    assert loop.run(dataclasses.replace(loop_config, resume=str(folder / "4"))).step == 6
    assert_same_step(whole[0], folder, 6)
    assert (folder / "6.set-aside-1").is_dir() and lines(folder) == lines(whole[0])


def test_init_from_takes_the_weights_alone(whole, config, tmp_path):
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"), init_from=str(whole[0]))
    run = loop.Run(config, tmp_path / "run")
    expected = checkpoint.open_run(whole[0]).params()
    for a, b in zip(jax.tree.leaves(run.state.params), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(a, b)
    assert run.step == run.row == run.state.adam.count == 0 and not np.any(run.state.adam.mu["embed"])


@pytest.fixture(scope="module")
def dequantised():
    """(model, float32 parameters) of a checkpoint in FP8."""
    return hub.load(MODELS / "tiny_e_fp8_mtp", weights="dequantised", dtype=np.float32)


@pytest.mark.parametrize("source", ["hugging_face", "orbax"])
def test_init_from_weights_in_fp8(source, dequantised, tmp_path):
    """Of a Hugging Face directory, and of the run that to-orbax makes of it: dequantised, in float32, where the masters lie."""
    path, (model, expected) = MODELS / "tiny_e_fp8_mtp", dequantised
    if source == "orbax":
        to_orbax(path, tmp_path / "run")
        path = tmp_path / "run"
    decoder, mesh = Decoder(model), meshes.make("data=2", jax.devices()[:2])
    shardings = Trainer(decoder, TrainConfig(model=model), mesh).shardings.params
    params = loop._load_params(str(path), decoder, mesh, shardings)
    for found, wanted, sharding in zip(*map(jax.tree.leaves, (params, expected, shardings)), strict=True):
        assert found.dtype == np.float32 and found.sharding == sharding
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(UserError, match=r"does not fit the model: missing .*q_proj"):
        other = dataclasses.replace(model, q_lora_rank=None)
        loop._load_params(str(path), Decoder(other), mesh, shardings)


def test_full_memory_is_one_line(config, tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 25600000000 bytes.\nmore lines")

    monkeypatch.setattr(loop, "Run", full)
    with pytest.raises(UserError, match=r"^the memory of the device is full: lower --microbatch-size.*$"):
        loop.run(dataclasses.replace(config, workdir=str(tmp_path)))


def test_a_diverging_run_stops_with_its_checkpoints_intact(config, tmp_path):
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e30, warmup_steps=0)
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"), optimizer=optimizer, max_bad_steps=3, batch_ramp_from=None)
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row, up to step (4|5).*run/\d, is intact"):
        loop.run(config)
    saved = checkpoint.open_run(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved.params()))
    assert [line["grad_norm"] is None for line in lines(tmp_path / "run") if "loss" in line][-3:] == [True] * 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resume": "never"}, "already holds a run .step 6."),
        ({"resume": "/nowhere"}, "does not exist"),
        ({"steps": 5}, "is beyond step 5: give at least --steps 6"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"sequence_length": 16}, "sequence_length was 32, is 16"),
        ({"model.hidden_size": 64}, "model.hidden_size was 32, is 64"),
        ({"optimizer.ema_decay": None}, "optimizer.ema_decay was a number, is None"),
        ({"data.fim_rate": 0.5}, "data.fim_rate was 0.0, is 0.5"),
        ({"mesh": "data=3"}, "there are 8"),
        ({"batch_size": 12}, "batch_size=12|batch_ramp_from"),
        ({"precision": "fp8"}, "needs an NVIDIA Hopper GPU"),
    ],
)
def test_what_cannot_go_on_says_so(whole, config, change, message):
    """And leaves the run as it is."""
    [(name, value)] = change.items()
    config = dataclasses.replace(config, workdir=str(whole[0]))
    if "." in name:
        group, name = name.split(".")
        value, name = dataclasses.replace(getattr(config, group), **{name: value}), group
    before = sorted(whole[0].rglob("*"))
    with pytest.raises(UserError, match=message):
        loop.run(dataclasses.replace(config, **{name: value}))
    assert sorted(whole[0].rglob("*")) == before


def test_a_process_told_to_stop_after_the_last_step(whole, config, monkeypatch):
    """Another one: this one must not go on alone to the evaluation, where it would wait for it."""
    told = iter([False, True])
    monkeypatch.setattr(loop.processes, "any_of", lambda flag: next(told))
    result = loop.run(dataclasses.replace(config, workdir=str(whole[0])))
    assert (result.step, result.stopped_by, result.heldout_bits_per_byte) == (6, signal.SIGTERM, None)


def test_what_went_wrong_first_is_told_first():
    def failing(text):
        raise UserError(text)

    with pytest.raises(ZeroDivisionError) as error, loop._then(lambda: failing("second"), lambda: failing("third")):
        1 / 0  # noqa: B018
    assert error.value.__notes__ == ["second", "third"]
    with pytest.raises(UserError, match="second") as error, loop._then(lambda: failing("second"), lambda: failing("third")):
        pass
    assert error.value.__notes__ == ["third"]
    told = pytest.raises(UserError, match=r"^run: No space left on device; second: make room")
    with told, loop._told_of_files(Path("run")), loop._then(lambda: failing("second")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_process_a_folder(config, tmp_path):
    with loop._locked(tmp_path), pytest.raises(UserError, match="another process is training"), loop._locked(tmp_path):
        pass


def test_metrics_of_steps_that_will_happen_again_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n\xff\xfe\n{"step": 3, "lo')
    log = metrics.MetricsLog(tmp_path, 1)
    log.write(2, {"loss": float("nan"), "load": [[1.0, float("inf")]]})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None, "load": [[1.0, None]]}]
