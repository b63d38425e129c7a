"""A file of requests to a file of answers: in input order, resumable, one bad line never stops the rest.

Input: OpenAI batch lines {"custom_id", "method", "url", "body"}, bare {"prompt": …} or {"messages": …} lines, or a .txt with one prompt
a line. Output, one line each: {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}. The output file is its
own record of what is done: started again with the same input, a run drops a line that was cut off and goes on after the last whole one.
"""

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.command_line import check_file
from dsv3_jax.errors import UserError
from dsv3_jax.serving.openai import CHAT, COMPLETIONS, Api, Job, error_body
from dsv3_jax.serving.request import Completion, InvalidParameter, Request, derive_seed

REQUESTS = "a .jsonl or .txt file of requests"
_WINDOW = 16  # times max_batch: answers that may wait for an earlier line's


class Line(NamedTuple):
    """A line of the input. problem: why there is no body, if so."""

    number: int
    custom_id: str
    url: str = COMPLETIONS
    body: Any = None
    problem: UserError | None = None


def read_lines(path: Path) -> Iterator[Line]:
    """The requests of a file; empty lines are none. A line that cannot be read becomes one with a problem."""
    plain_text = path.suffix == ".txt"
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield _read_line(number, raw, plain_text)


def _read_line(number: int, raw: bytes, plain_text: bool) -> Line:
    custom_id = f"line-{number}"
    try:
        text = raw.decode().rstrip("\r\n")
        if plain_text:
            return Line(number, custom_id, body={"prompt": text})
        value = json.loads(text)
        if not isinstance(value, dict):
            raise InvalidParameter("the line is not a JSON object")
        if "custom_id" in value:
            if not isinstance(value["custom_id"], str):
                raise InvalidParameter(f"custom_id is {json.dumps(value['custom_id'])[:60]}: it must be a string", "custom_id")
            custom_id = value["custom_id"]
        if "body" not in value and "url" not in value:
            body = {name: field for name, field in value.items() if name != "custom_id"}
            return Line(number, custom_id, CHAT if "messages" in body else COMPLETIONS, body)
        method, url = value.get("method", "POST"), value.get("url")
        if url not in (CHAT, COMPLETIONS) or method != "POST":
            raise InvalidParameter(f"{method} {url} is not supported: POST {CHAT} or {COMPLETIONS}", "url")
        return Line(number, custom_id, url, value.get("body"))
    except UnicodeDecodeError as error:
        return Line(number, custom_id, problem=InvalidParameter(f"the line is not UTF-8 ({error.reason} at byte {error.start})"))
    except (ValueError, RecursionError) as error:
        return Line(number, custom_id, problem=InvalidParameter(f"the line is not valid JSON ({error})"))
    except InvalidParameter as error:
        return Line(number, custom_id, problem=error)


def run_batch(api: Api, source: Path, target: Path, *, seed: int = 0, progress: Callable[[int, int, Api], None] | None = None) -> int:
    """Answers every line of `source` that `target` does not answer yet; returns how many failed (of those done now).

    seed: of lines that name none, together with their number. progress: called with (lines done, lines in all) first and after each step.
    Raises UserError where the input cannot be read, the output cannot be written, or it belongs to another input.
    """
    check_file(source, REQUESTS)
    if source.resolve() == target.resolve():
        raise UserError(f"{target} is the input itself: give another output")
    total = sum(1 for _ in read_lines(source))
    lines = read_lines(source)
    run, failed = _Run(api, seed), 0
    with _told_of_output(target):
        done = _resume(target, lines)
    with _told_of_output(target), target.open("ab") as file:
        if progress:
            progress(done, total, api)
        while True:
            run.fill(lines)
            if not run.waiting:
                return failed
            run.step()
            for record in run.finished():
                failed += record["error"] is not None
                file.write(_encode(record) + b"\n")
                done += 1
            file.flush()
            if progress:
                progress(done, total, api)


@contextlib.contextmanager
def _told_of_output(target: Path) -> Iterator[None]:
    """What the file system refuses, as a UserError."""
    try:
        yield
    except BrokenPipeError:  # whoever reads the answers has enough of them
        raise
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error.strerror}): make room or rights there and start again, which goes on where it stopped, "
            "or give another output"
        ) from error


def _resume(target: Path, lines: Iterator[Line]) -> int:
    """How many lines of the output are done; as many are taken from `lines`. What follows the last whole line is cut off.

    Raises UserError where the output is another input's, or damaged before its end.
    """
    if not target.is_file():  # not there yet, or a pipe or device, which keeps nothing
        return 0
    done, offset, size = 0, 0, target.stat().st_size
    with target.open("rb") as file:
        for raw in file:
            try:
                custom_id = json.loads(raw)["custom_id"] if raw.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                custom_id = None
            if custom_id is None:
                if offset + len(raw) < size:
                    raise UserError(f"{target} has a damaged line {done + 1}, and others after it: move it away and start again")
                break
            line = next(lines, None)
            if line is None or line.custom_id != custom_id:
                raise UserError(f"{target} answers another input (line {done + 1} is {custom_id!r}): give another output, or move it away")
            done, offset = done + 1, offset + len(raw)
    if offset < size:
        os.truncate(target, offset)
    return done


class _Pending:
    """A line on its way: a job whose answers are not all there, or a record that waits for its turn."""

    def __init__(self, line: Line):
        self.line = line
        self.job: Job | None = None
        self.completions: dict[Request, Completion] = {}
        self.record: dict | None = None


class _Run:
    """Lines in the engine, in input order."""

    def __init__(self, api: Api, seed: int):
        self.api, self.seed = api, seed
        self.waiting: deque[_Pending] = deque()
        self._owner: dict[Request, _Pending] = {}

    def fill(self, lines: Iterator[Line]) -> None:
        """Takes lines in while there is room."""
        most = self.api.engine.scheduler.max_batch
        while len(self.waiting) < _WINDOW * most and len(self._owner) < 2 * most and (line := next(lines, None)) is not None:
            pending = _Pending(line)
            self.waiting.append(pending)
            try:
                if line.problem:
                    raise line.problem
                job = self.api.parse(line.url, line.body, id=f"batch_req_{line.number}", seed=derive_seed(self.seed, line.number))
                if job.stream:
                    raise InvalidParameter("stream is for HTTP: leave it out of a batch", "stream")
                for request in job.requests:
                    self.api.engine.add(request)
                    self._owner[request] = pending
            except UserError as error:
                pending.record = _record(pending.line, None, error_body(error))
            else:
                pending.job = job
                pending.completions = {request: Completion(request) for request in job.requests}

    def step(self) -> None:
        """One step of the engine, if it has anything to do."""
        if not self.api.engine.has_work:
            return
        for output in self.api.engine.step():
            pending = self._owner[output.request]
            pending.completions[output.request].extend(output)
            if output.finish_reason is not None:
                del self._owner[output.request]
                if all(completion.finish_reason for completion in pending.completions.values()):
                    body = self.api.response(pending.job, list(pending.completions.values()))
                    pending.record = _record(pending.line, {"status_code": 200, "request_id": pending.job.id, "body": body}, None)

    def finished(self) -> Iterator[dict]:
        """Records whose turn it is."""
        while self.waiting and self.waiting[0].record is not None:
            yield self.waiting.popleft().record


def _encode(record: dict) -> bytes:
    """Readable UTF-8; half a surrogate pair, which JSON can write and UTF-8 cannot, makes the line ASCII."""
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(record).encode()


def _record(line: Line, response: dict | None, error: dict | None) -> dict:
    return {"id": f"batch_req_{line.number}", "custom_id": line.custom_id, "response": response, "error": error}
