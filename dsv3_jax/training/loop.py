"""A training run from its config: data, steps, metrics, evaluation, checkpoints.

A run is a function of its config alone: initial weights come from the seed, step k takes rows that the seed and k decide, and nothing
else is drawn at random. What a checkpoint holds (parameters, optimizer, counters, position in the data) is therefore all there is, and
a run that was stopped goes on bit for bit as if it had not been.
"""

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax import checkpoint, command_line, compilation_cache, hub
from dsv3_jax.config import TrainConfig, from_dict, to_dict
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.loader import READ_AHEAD, Loader, heldout_batches
from dsv3_jax.data.prepare import Prepared, bits_per_byte, prepare, train_tokenizer
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError, full_memory_told
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel import processes, watch
from dsv3_jax.parallel.sharding import param_shardings
from dsv3_jax.precision import fp8_axes, from_fp8, has_fp8
from dsv3_jax.precision.recipe import check_devices, recipe
from dsv3_jax.training import pipeline, schedules
from dsv3_jax.training.metrics import MetricsLog, Progress, load_max_over_mean
from dsv3_jax.training.step import Trainer, TrainState

# A run's place in its data, before the first step: steps done, rows consumed by them, the name of the folder of prepared rows.
POSITION = {"step": 0, "row": 0, "rows": ""}


class Result(NamedTuple):
    """How a run ended. stopped_by: the signal that stopped it, or None; heldout_bits_per_byte: None when stopped or nothing is held out."""

    directory: Path
    step: int
    stopped_by: int | None
    heldout_bits_per_byte: float | None
    prepared: Prepared


def run(config: TrainConfig) -> Result:
    """Train, or go on training, in `config.workdir`. Raises UserError, with the last complete checkpoint intact."""
    directory = Path(config.workdir)
    fix = "lower --microbatch-size, keep less for the backward pass (--remat layer), or spread the run over more devices (--mesh)"
    with _locked(directory), _told_of_files(directory), full_memory_told(fix):
        return Run(config, directory).train()


class Run:
    """One run; its parts are made in the order in which they can go wrong, the cheap ones first."""

    def __init__(self, config: TrainConfig, directory: Path):
        self.config, self.directory = config, directory
        numerics = recipe(resolve_precision(config.precision))
        check_devices(numerics)
        self.mesh = meshes.make(config.mesh)
        pipeline.check_mesh(config, self.mesh.shape)
        if config.sequence_length > config.model.max_position_embeddings:
            raise UserError(
                f"sequence_length={config.sequence_length} is more than model.max_position_embeddings="
                f"{config.model.max_position_embeddings}: raise the one, which is also what serving allows, or lower the other"
            )
        process, count = jax.process_index(), jax.process_count()
        self.share = meshes.share_of_rows(self.mesh, process)
        _check_room_for_rows(config, self.share[1])
        self.resumed_from = _find_resumed(config, directory)
        position = self.resumed_from.load({"data": POSITION})["data"] if self.resumed_from else POSITION
        self.step, self.row = position["step"], position["row"]  # steps done, rows consumed by them
        # One process prepares: elsewhere the same corpus may be other files, or have other times, and would make other rows.
        rows = processes.from_first(lambda: _prepare(config, directory, position["rows"], self.resumed_from))
        self.prepared = Prepared.open(_cache(config, directory) / rows)
        options = {"seed": config.seed, "segment_ids": config.data.mask_documents}
        self.loader = Loader(self.prepared.directory, process_index=self.share[0], process_count=self.share[1], **options)
        self.watch = watch.Watch(directory / "where", process, count, config.max_wait, watch.place(self.mesh, process))
        self.decoder = Decoder(config.model, numerics, remat=config.remat)
        self.trainer = Trainer(self.decoder, config, self.mesh)
        compilation_cache.use()
        self.state = self._initial_state() if self.resumed_from is None else self._restored_state()

    # State.

    def _initial_state(self) -> TrainState:
        config, shardings = self.config, self.trainer.shardings
        if config.init_from is None:
            # An argument, or the compiler would draw the parameters itself; NumPy's, as all processes have it.
            key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
            init = jax.jit(
                lambda key: self.decoder.init(jax.random.wrap_key_data(key)),
                out_shardings=shardings.params,
                # It runs once. The same values; for tiny 8 s of compilation on one core instead of 20.
                compiler_options={"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None,
            )
            params = init(key)
        else:
            params = _load_params(config.init_from, self.decoder, self.mesh, shardings.params)
        return jax.jit(self.trainer.init, out_shardings=shardings, donate_argnums=0)(params)

    def _restored_state(self) -> TrainState:
        state, shardings = jax.eval_shape(self.trainer.init, self.decoder.abstract_params()), _items(self.trainer.shardings)
        items = {name: checkpoint.with_shardings(item, shardings[name]) for name, item in _items(state).items()}
        saved = self.resumed_from.load(items)
        return TrainState(params=saved["params"], ema=saved.get("ema"), **saved["train_state"])

    def _save(self) -> None:
        position = {"step": self.step, "row": self.row, "rows": self.prepared.directory.name}
        with self.watch.waiting(f"saving step {self.step}"):
            self.writer.save(self.step, _items(self.state) | {"data": position})

    # Steps.

    def train(self) -> Result:
        """To the end, or until a signal stops it: what has been trained is then saved. Before, a signal ends the process as any other."""
        with stop_signals() as self.stop:
            return self._train_and_evaluate()

    def _train_and_evaluate(self) -> Result:
        config, directory, reports = self.config, self.directory, jax.process_index() == 0
        if reports:
            if self.resumed_from is not None and self.resumed_from.directory.parent == directory.absolute():
                checkpoint.set_aside_after(directory, self.step)
            checkpoint.write_atomically(directory / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
        self.writer = checkpoint.Writer(directory, to_dict(config), keep=config.keep_checkpoints)
        log = MetricsLog(directory if reports else None, self.step)
        progress = Progress(config.steps, quiet=not reports)
        with _then(log.close, self.writer.wait), progress:
            progress.say(self._banner())
            self._train(log, progress)
            bits = self._evaluate_all(log, progress)
        stopped_by = self.stop[0] if self.stop and bits is None else None
        return Result(directory, self.step, stopped_by, bits, self.prepared)

    def _train(self, log: MetricsLog, progress: Progress) -> None:
        config, clock = self.config, _Clock()
        batches = self.loader.batches((step.first_row, step.num_rows) for step in schedules.steps(config, self.step, self.row))
        pending = None  # the metrics of a step are read while the next one runs
        if self._told_to_stop():
            return  # before the first step: later ones end the loop, saved
        for step, batch in zip(schedules.steps(config, self.step, self.row), batches):
            with self.watch.waiting(f"step {step.number + 1}"):
                self.state, metrics = self.trainer.step(self.state, self._place(batch), step.scheduled)
            if pending:
                self._report(*pending, clock, log, progress)
            pending = step, metrics
            self.step, self.row = step.number + 1, step.first_row + step.num_rows
            last = self.step == config.steps or self._told_to_stop()
            evaluates = self.step % config.eval_every == 0 and not last
            if last or evaluates or self.step % config.checkpoint_every == 0:
                self._report(*pending, clock, log, progress)
                pending = None
                if last or self.step % config.checkpoint_every == 0:
                    self._save()
                if evaluates:
                    self._evaluate_some(metrics["load"], log, progress)
                    clock.pause()
            if last:
                break
            self.writer.check()  # steps that could not be saved are not worth making

    def _told_to_stop(self) -> bool:
        """Whether this or any other process was: all stop at the same step."""
        with self.watch.waiting(f"the meeting after step {self.step}"):
            told = processes.any_of(bool(self.stop))
        if told and not self.stop:
            self.stop.append(signal.SIGTERM)
        return told

    def _place(self, batch: dict) -> dict:
        return {name: jax.make_array_from_process_local_data(self.trainer.batch_sharding, rows) for name, rows in batch.items()}

    def _report(self, step: schedules.Step, metrics: dict, clock: "_Clock", log: MetricsLog, progress: Progress) -> None:
        with self.watch.waiting(f"step {step.number + 1}"):
            metrics = jax.device_get(metrics)
        load_LE, overflow = metrics.pop("load"), metrics.pop("overflow", {})
        overflow = {
            jax.tree_util.keystr(path, simple=True, separator="/"): counts.tolist()
            for path, counts in jax.tree.leaves_with_path(overflow)
            if counts.any()
        }
        number, row = step.number + 1, step.first_row + step.num_rows
        tokens = step.num_rows * self.config.sequence_length
        clock.tick(tokens)
        values = {name: value.item() for name, value in metrics.items()} | {
            "load_max_over_mean": load_max_over_mean(load_LE),
            "learning_rate": float(step.scheduled.learning_rate),
            "tokens": row * self.config.sequence_length,
            "tokens_per_second": clock.tokens_per_second,
        }
        log.write(number, values | ({"overflow": overflow} if overflow else {}))
        left = schedules.total_tokens(self.config) - values["tokens"]
        progress.show(number, values | {"seconds_left": left / clock.tokens_per_second if clock.tokens_per_second else float("inf")})
        if values["skipped_in_row"] >= self.config.max_bad_steps:
            raise UserError(
                f"loss or gradient was not finite in {values['skipped_in_row']} steps in a row, up to step {number}: {self._intact()}; "
                "lower optimizer.learning_rate, or look at the data of these steps"
            )

    def _intact(self) -> str:
        """Which checkpoint is left, once the save in flight has ended: before, the last one would be named too early."""
        try:
            self.writer.wait()
        except UserError as error:
            return str(error)
        steps = checkpoint.complete_steps(self.directory)
        return f"the last checkpoint, {self.directory / str(steps[-1])}, is intact" if steps else "nothing was saved yet"

    # Evaluation.

    def _evaluate(self, every: int = 1) -> tuple[float, float] | None:
        """(nats, tokens) of every n-th batch of the held-out rows; None where a process is told to stop meanwhile."""
        parts = {"process_index": self.share[0], "process_count": self.share[1]}
        nats = count = 0.0
        for i, batch in enumerate(heldout_batches(self.prepared.directory, self._eval_batch, **parts)):
            if i % every == 0:
                if self._told_to_stop():
                    return None
                with self.watch.waiting(f"the evaluation after step {self.step}"):
                    loss, num_tokens = self.trainer.next_token_loss(self.state.params, self._place(batch))
                    nats, count = nats + float(loss), count + float(num_tokens)
        return nats, count

    @property
    def _eval_batch(self) -> int:
        return self.config.microbatch_size or self.config.batch_size

    def _evaluate_some(self, load_LE: jax.Array, log: MetricsLog, progress: Progress) -> None:
        load = {"load": np.asarray(load_LE).tolist()}
        if self.prepared.heldout.rows:
            num_batches = -(-self.prepared.heldout.rows // self._eval_batch)
            evaluated = self._evaluate(every=max(1, num_batches * self._eval_batch // self.config.eval_rows))
            if evaluated is None:
                return
            nats, count = evaluated
            load["heldout_loss"] = nats / count
            progress.say(f"step {self.step}: held-out loss {nats / count:.4f}")
        log.write(self.step, load)

    def _evaluate_all(self, log: MetricsLog, progress: Progress) -> float | None:
        if not self.prepared.heldout.rows:
            return None
        if self._told_to_stop():
            return None
        progress.say("coding the held-out documents")
        if (evaluated := self._evaluate()) is None:
            return None
        nats, count = evaluated
        bits = bits_per_byte(nats, self.prepared.heldout.bytes)
        log.write(self.step, {"heldout_loss": nats / count, "heldout_bits_per_byte": bits})
        return bits

    def _banner(self) -> str:
        c, parameters = self.config, sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        start = "from new weights" if self.resumed_from is None else f"going on from {self.resumed_from.directory}"
        if self.resumed_from is None and c.init_from:
            start = f"from the weights of {c.init_from}"
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        skipped = f"left out of the corpus, as they are not UTF-8: {self.prepared.skipped:,} documents\n" if self.prepared.skipped else ""
        return skipped + (
            f"{parameters:,} parameters, {c.batch_size} x {c.sequence_length} tokens a step, {c.steps} steps {start}\n"
            f"{self.decoder.recipe.name} on {jax.devices()[0].device_kind} ({mesh}); in {self.directory}; compiling the step ..."
        )


def resolve_precision(precision: str) -> str:
    """`auto` by the backend: bf16 on a GPU, float32 on a CPU, where bfloat16 is slow."""
    return precision if precision != "auto" else ("float32" if jax.default_backend() == "cpu" else "bf16")


def _items(state: TrainState) -> dict:
    """The state as it lies in a checkpoint."""
    train_state = {"adam": state.adam, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}
    return {"params": state.params, "train_state": train_state} | ({"ema": state.ema} if state.ema is not None else {})


def _check_room_for_rows(config: TrainConfig, parts: int) -> None:
    """Raises UserError where this machine's memory is too small for one of so many parts of a batch, and for those that are read ahead."""
    needed = (1 + READ_AHEAD) * 4 * (config.sequence_length + 1) * config.batch_size // parts
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"batch_size={config.batch_size} rows of {config.sequence_length} tokens, with those that are read ahead, need "
            f"{needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f}: lower --batch-size"
        )


def _cache(config: TrainConfig, directory: Path) -> Path:
    """The folder of prepared rows."""
    return Path(config.data.cache) if config.data.cache else directory / "data"


def _prepare(config: TrainConfig, directory: Path, rows: str, resumed_from: checkpoint.Saved | None) -> str:
    """The name of the folder of rows, made or found. The tokenizer goes into the run folder for whoever loads the run.

    rows: the name of those a run began with, which it must go on with; '' for a new run.
    """
    data, cache = config.data, _cache(config, directory)
    if rows and (cache / rows / "meta.json").exists():
        tokenizer = Tokenizer.load(resumed_from.directory.parent / "tokenizer")  # damage is told now, and not when the run ends
        if resumed_from.directory.parent != directory.absolute():
            tokenizer.save(directory / "tokenizer")
        return rows  # whatever has become of the corpus
    corpus = Corpus(data.corpus, heldout_fraction=data.heldout_fraction)
    tokenizer = Tokenizer.load(data.tokenizer) if data.tokenizer else train_tokenizer(corpus, config.model.vocab_size, cache)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens and model.vocab_size is {config.model.vocab_size}: raise it")
    for name in ("bos_token", "eos_token"):  # what is generated ends there, and an exported config.json says so
        ours, model_s = tokenizer.special_id(name), getattr(config.model, f"{name}_id")
        if ours is not None and ours != model_s:
            raise UserError(
                f"the tokenizer's {name} is {ours} and model.{name}_id is {model_s}: give --model.{name.replace('_', '-')}-id {ours}"
            )
    prepared = prepare(corpus, tokenizer, cache, sequence_length=config.sequence_length, fim_rate=data.fim_rate, seed=config.seed)
    if rows and prepared.directory.name != rows:
        raise UserError(
            f"the corpus has changed and {cache / rows}, the rows this run was trained on, is gone: restore one of them, "
            "or start a new run from its weights with --init-from and another --workdir"
        )
    tokenizer.save(directory / "tokenizer")
    return prepared.directory.name


def _find_resumed(config: TrainConfig, directory: Path) -> checkpoint.Saved | None:
    """The step to go on from, if any, checked to be of the same run."""
    steps = checkpoint.complete_steps(directory)
    if config.resume in ("auto", "never"):
        if config.resume == "never" and steps:
            raise UserError(f"{directory} already holds a run (step {steps[-1]}): --resume auto goes on with it, or name another --workdir")
        if not steps:
            return None
    saved = checkpoint.open_run(directory if config.resume == "auto" else config.resume)
    if steps and saved.directory.parent != directory.absolute():
        raise UserError(f"{directory} already holds a run (step {steps[-1]}): to go on with {saved.directory} name another --workdir")
    old, new = _kept(from_dict(TrainConfig, saved.config)), _kept(config)
    if changed := [f"{name} was {old[name]}, is {new[name]}" for name in old if old[name] != new[name]]:
        raise UserError(f"{saved.directory} is of another run ({'; '.join(changed)}): use its settings, or another --workdir")
    if saved.step > config.steps:
        raise UserError(f"{saved.directory} is beyond step {config.steps}: give at least --steps {saved.step}, or --resume an earlier step")
    return saved


def _kept(config: TrainConfig) -> dict:
    """What a run that is gone on with must keep, by the names of the fields."""
    groups = {f"{group}.{name}": value for group in ("model", "data") for name, value in to_dict(getattr(config, group)).items()}
    del groups["data.cache"]
    # A moving average can neither begin on the way nor be lost without a word.
    average = None if config.optimizer.ema_decay is None else "a number"
    return groups | {"sequence_length": config.sequence_length, "seed": config.seed, "optimizer.ema_decay": average}


def _load_params(path: str, decoder: Decoder, mesh: jax.sharding.Mesh, shardings: Any) -> dict:
    """Float32 parameters of a run folder, one of its steps, or a Hugging Face directory; FP8 weights are dequantised."""
    if hub.is_checkpoint(Path(path)):
        found = Decoder(hub.config_json.read(Path(path))[0]).abstract_params()
        load = lambda: hub.load(path, shardings=shardings, dtype=np.float32, weights="dequantised")[1]  # noqa: E731
    else:
        saved = checkpoint.open_run(path)
        stored = saved.abstract()
        found = jax.eval_shape(from_fp8, stored)
        if has_fp8(stored):
            stored_shardings = param_shardings(fp8_axes(decoder.logical_axes()), mesh)
            load = lambda: jax.jit(from_fp8, out_shardings=shardings)(saved.params(np.float32, stored_shardings))  # noqa: E731
        else:
            load = lambda: saved.params(np.float32, shardings)  # noqa: E731
    if problems := checkpoint.differences(decoder.abstract_params(), found):
        raise UserError(f"--init-from {path} does not fit the model: {problems}. Give the config of the same model")
    return load()


class _Clock:
    """Tokens per second, a moving average over the last steps; pauses (evaluation, and what was compiled first) do not count."""

    def __init__(self):
        self.tokens_per_second, self._last = 0.0, None

    def tick(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._last is not None:
            rate = tokens / max(now - self._last, 1e-9)
            self.tokens_per_second = 0.9 * self.tokens_per_second + 0.1 * rate if self.tokens_per_second else rate
        self._last = now

    def pause(self) -> None:
        self._last = None


@contextlib.contextmanager
def _then(*ends: Callable[[], None]) -> Iterator[None]:
    """Calls all of them at the end. What was raised first is what is raised; what they raise after it is noted on it."""
    first = None
    try:
        yield
    except BaseException as error:
        first = error
    for end in ends:
        try:
            end()
        except Exception as error:
            if first is not None:
                first.add_note(str(error))
            first = first or error
    if first is not None:
        raise first


@contextlib.contextmanager
def _told_of_files(directory: Path) -> Iterator[None]:
    """What the file system refuses, as a UserError."""
    try:
        yield
    except (ConnectionError, TimeoutError):  # of OSError's kind, and not of files
        raise
    except OSError as error:
        reason = "; ".join([error.strerror or str(error), *command_line.notes(error)])
        where = error.filename or directory
        raise UserError(f"{where}: {reason}: make room or rights there and start again; complete checkpoints are intact") from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Only one process trains in a folder. The lock goes with its process, however that ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}): give a --workdir that can be written") from error
    with lock:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process is training in {directory}: wait for it, or give another --workdir") from None
        yield


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Signals to stop, as they come: the step that runs is finished and saved. A second Ctrl-C ends the run at once."""
    received: list[int] = []

    def receive(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
