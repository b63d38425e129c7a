"""What a run tells while it goes: a line on the screen, metrics.jsonl, TensorBoard events."""

import json
import math
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from dsv3_jax.checkpoint import write_atomically

_SECONDS_BETWEEN_LINES = 5.0  # where the output is not a terminal


def load_max_over_mean(load_LE: np.ndarray) -> float:
    """How much more than its share the busiest expert got, in the worst layer: 1 is perfect balance."""
    return float((load_LE.max(axis=-1) / np.maximum(load_LE.mean(axis=-1), 1e-9)).max()) if load_LE.size else 1.0


class MetricsLog:
    """One JSON object a line in `metrics.jsonl`, and the scalars of it as TensorBoard events in `tensorboard/`.

    Going on after `step`, what an interrupted run wrote about later steps is dropped, for it happens again. Without a directory nothing
    is written: of several processes the first reports.
    """

    def __init__(self, directory: Path | None, step: int):
        self._file = None
        if directory is None:
            return
        path = directory / "metrics.jsonl"
        if path.exists():
            write_atomically(path, "".join(line + "\n" for line in path.read_text(errors="replace").splitlines() if _is_up_to(line, step)))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._events = EventFileWriter(str(directory / "tensorboard"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, values: dict) -> None:
        """values: numbers, lists of numbers, dicts of these; a number that is not finite is written as null."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step} | {name: _finite(value) for name, value in values.items()}) + "\n")
        scalars = [
            summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items() if isinstance(value, int | float)
        ]
        self._events.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=scalars)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._events.close()


def _is_up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be half a line
        return False


def _finite(value):
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


class Progress:
    """The state of the run in one line: kept up to date on a terminal, printed every few seconds elsewhere."""

    def __init__(self, steps: int, *, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        self._steps, self._printed = steps, -math.inf
        self._live = Live(console=self.console, auto_refresh=False, transient=False) if self.console.is_terminal and not quiet else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def show(self, step: int, m: dict) -> None:
        """m: the metrics of a step, with "tokens_per_second", "load_max_over_mean" and "seconds_left"."""
        line = (
            f"step {step}/{self._steps}  loss {m['loss']:.4f} = main {m['main']:.4f}, mtp {m['mtp']:.4f}, balance {m['balance']:.3f}  "
            f"load max/mean {m['load_max_over_mean']:.2f}  {m['tokens_per_second']:,.0f} tokens/s  {duration(m['seconds_left'])} left"
        )
        if m["skipped"]:
            line += f"  {m['skipped']} skipped"
        if self._live:
            self._live.update(Text(line), refresh=True)
        elif time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES or step == self._steps:
            self._printed = time.monotonic()
            self.say(line)

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        self.console.print(Text(text), soft_wrap=True)


def duration(seconds: float) -> str:
    """90 -> '1:30'; '?' where it is not known yet."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
