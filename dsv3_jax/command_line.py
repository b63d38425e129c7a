"""What commands have in common: an error is one line that names cause and fix, and an exit status."""

import argparse
import contextlib
import functools
import io
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError

WRONG_INPUT, INTERRUPTED, NOBODY_READS = 2, 128 + signal.SIGINT, 128 + signal.SIGPIPE  # exit statuses


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def parsed(parse: Callable[[], Any]) -> Any:
    """What `parse`, a call of tyro, returns. Raises UserError where tyro would draw a box and exit; --help prints and exits as ever."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return parse()
    except SystemExit as stop:
        if not stop.code:
            raise
        # The box: a title, the message, a rule, and help; without lines around it where the terminal is not UTF-8.
        rule = "─- "
        lines = itertools.dropwhile(lambda line: not line.strip(rule), (line.strip("│ ") for line in printed.getvalue().splitlines()[1:]))
        message = " ".join(itertools.takewhile(lambda line: line.strip(rule), lines))
        raise UserError(f"{message} (--help lists the options)") from None


def check_backend() -> None:
    """Raises UserError where JAX starts no backend, as where JAX_PLATFORMS names devices that are not here."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms, reason = os.environ.get("JAX_PLATFORMS", ""), " ".join(str(error).split())
        raise UserError(
            f"JAX finds no device with JAX_PLATFORMS={platforms!r}{f' ({reason})' if reason else ''}: leave it unset, or install the extra "
            "`cuda` on a machine with GPUs"
        ) from error


def check_file(path: Path, what: str) -> None:
    """Raises UserError, which says what to give, where it is no file."""
    if not path.is_file():
        raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}: give {what}")


def deferred(function: Callable) -> Callable:
    """A function of the same signature that calls nothing: it returns the call, to be made when all options are known to be right."""

    @functools.wraps(function)
    def bind(*args, **kwargs):
        return functools.partial(function, *args, **kwargs)

    return bind


def run(command: Callable[[], Any]) -> int:
    """The exit status of a command: what it returns (None: 0), or 2 after a UserError, printed in one line; 141 where a pipe is closed.

    Ctrl-C ends the process here, with 130: while Python shuts down Orbax may not start the threads that a save in flight needs, and that
    save would never let the process go.
    """
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {'; '.join([str(error), *notes(error)])}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:  # whoever read what is printed has read enough; Python would try once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(INTERRUPTED)


def notes(error: BaseException) -> Iterable[str]:
    """What was added to an error (`add_note`): what went wrong on top of it."""
    return getattr(error, "__notes__", ())
