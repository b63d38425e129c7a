"""Says which process waited where for which, when one does not come to where all meet, and ends the run instead of waiting for ever.

A process that dies is missed by its heartbeat (processes.py). One that lives but is stuck, in a file system or on a broken link, is not:
the others would wait in a collective without a word. Every process notes in the run folder where it is, and reads there, when its own
time is up, where the others are.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STATUS = 3  # of a process that ends here; the run goes on from its last checkpoint when it is started again


class Watch:
    """Of one process of `count`.

    directory: one that all of them see. seconds: how long any of them may wait. place: where its devices are in the mesh, for people.
    """

    def __init__(self, directory: Path, process: int, count: int, seconds: float, place: str):
        self.process, self.count, self.seconds, self.place = process, count, seconds, place
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._note("before its first step")

    @contextlib.contextmanager
    def waiting(self, where: str) -> Iterator[None]:
        """Around a wait for the other processes or for the devices: beyond the time this process ends."""
        self._note(f"waiting in {where}")
        timer = threading.Timer(self.seconds, self._give_up, (where, time.monotonic()))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._note(f"after {where}")

    def _note(self, doing: str) -> None:
        """Small and written at once, so that whoever reads sees one note or the next.

        A note that cannot be written ends nothing: a full disk is for those to tell who save there, and an older note is worth something.
        """
        temporary = self._directory / f"{self.process}.new"
        with contextlib.suppress(OSError):
            temporary.write_text(f"{time.time()}\n{self.place}\n{doing}")
            temporary.replace(self._directory / str(self.process))

    def _give_up(self, where: str, since: float) -> None:
        waited = f"process {self.process} ({self.place}) waited {time.monotonic() - since:.0f} s in {where}"
        print(f"error: {waited}: {self._others(where)}; start the run again to go on from its last checkpoint", file=sys.stderr, flush=True)
        os._exit(STATUS)

    def _others(self, where: str) -> str:
        elsewhere = []
        for process in range(self.count):
            seen, place, doing = self._read(process)
            if process != self.process and doing != f"waiting in {where}":
                ago = "" if math.isinf(seen) else f", {time.time() - seen:.0f} s ago"
                elsewhere.append((seen, f"process {process} ({place}) was last seen {doing}{ago}"))
        if elsewhere:
            first = [text for _, text in sorted(elsewhere)]
            return "; ".join(first[:4]) + (f"; and {len(first) - 4} more are elsewhere" if len(first) > 4 else "")
        if self.count == 1:
            return "its devices did not finish"
        return f"so do all {self.count} processes: their devices or the links between them did not finish"

    def _read(self, process: int) -> tuple[float, str, str]:
        try:
            seen, place, doing = (self._directory / str(process)).read_text().split("\n")
            return float(seen), place, doing
        except (OSError, ValueError):
            return -math.inf, "place unknown", "nowhere"


def place(mesh, process: int) -> str:
    """The coordinates of the devices of a process in a mesh: "data=0, pipe=1, expert=0..3"."""
    import numpy as np

    mine = np.argwhere(np.vectorize(lambda device: device.process_index == process)(mesh.devices))
    spans = ((name, low, high) for name, low, high in zip(mesh.axis_names, mine.min(axis=0), mine.max(axis=0)))
    return ", ".join(f"{name}={low}" if low == high else f"{name}={low}..{high}" for name, low, high in spans)
