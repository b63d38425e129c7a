"""The engine on a thread of its own, and how asynchronous code talks to it."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator

from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.metrics import Metrics, Timing
from dsv3_jax.serving.request import Output, Request

log = logging.getLogger("dsv3_jax.serving")


class EngineFailed(Exception):
    """The engine stopped by an error of its own: nothing can be served any more."""


class Worker(threading.Thread):
    """Steps the engine while there is work; only this thread touches it."""

    def __init__(self, engine: Engine, metrics: Metrics):
        super().__init__(name="engine", daemon=True)
        self.engine, self.metrics = engine, metrics
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._streams: dict[Request, tuple[asyncio.AbstractEventLoop, asyncio.Queue, Timing]] = {}

    async def outputs(self, requests: list[Request]) -> AsyncIterator[Output]:
        """Queues requests that are prepared, and yields their outputs until all have ended. Left early, what runs is aborted.

        Raises EngineFailed.
        """
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue()
        left = set(requests)
        self._commands.put(("add", requests, loop, outputs))
        try:
            while left:
                if self.failure is not None:
                    raise EngineFailed(str(self.failure))
                if (output := await outputs.get()) is None:
                    continue
                if output.finish_reason is not None:
                    left.discard(output.request)
                yield output
        finally:
            if left:
                self._commands.put(("abort", left))

    def stop(self) -> None:
        """Ends the thread with the step it is at."""
        self._commands.put(("stop",))
        self.join()

    def run(self) -> None:
        try:
            while self._obey():
                self._hand_out(self.engine.step())
                if line := self.metrics.line():
                    log.info(line)
        except Exception as error:  # a bug, or the device is gone: say so, and let nobody wait
            log.exception("the engine failed")
            self.failure = error
            while True:
                for loop, outputs, _ in self._streams.values():
                    _send(loop, [(outputs, None)])
                self._streams.clear()
                command = self._commands.get()
                if command[0] == "add":
                    _send(command[2], [(command[3], None)])
                elif command[0] == "stop":
                    return

    def _hand_out(self, outputs: list[Output]) -> None:
        """A step's outputs to those who wait for them: waking a loop costs more than what it is told."""
        sent: dict[asyncio.AbstractEventLoop, list] = {}
        for output in outputs:
            loop, waiting, timing = self._streams[output.request]
            self.metrics.observe(output, timing)
            if output.finish_reason is not None:
                del self._streams[output.request]
            sent.setdefault(loop, []).append((waiting, output))
        for loop, of_loop in sent.items():
            _send(loop, of_loop)

    def _obey(self) -> bool:
        """Takes what was asked for meanwhile; waits where there is no work, for as long as the log can. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work, timeout=self.metrics.line_seconds)
            except queue.Empty:
                return True
            if command[0] == "stop":
                return False
            for request in command[1]:
                if command[0] == "add":
                    self.engine.add(request)
                    self._streams[request] = (*command[2:], Timing())
                elif self._streams.pop(request, None):
                    self.engine.abort(request)
                    self.metrics.ended("abort")


def _send(loop: asyncio.AbstractEventLoop, sent: list[tuple[asyncio.Queue, Output | None]]) -> None:
    def put():
        for outputs, output in sent:
            outputs.put_nowait(output)

    with contextlib.suppress(RuntimeError):  # the server is gone
        loop.call_soon_threadsafe(put)
