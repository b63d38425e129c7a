"""The one exception that users are meant to see."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """An error whose message is one line that names the cause and the fix; the commands print it without a traceback."""


@contextlib.contextmanager
def full_memory_told(fix: str) -> Iterator[None]:
    """What JAX raises where the memory of a device is full, as a UserError that says what to do about it."""
    import jax  # here: `--help` has no need of it

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):  # of a GPU, of a CPU
            raise
        raise UserError(f"the memory of the device is full: {fix}") from error


def needs_extra(what: str, extra: str) -> UserError:
    """What to raise where a package of an extra of pyproject.toml is missing."""
    return UserError(f"{what} needs the extra `{extra}`: uv sync --extra {extra}, or pip install '.[{extra}]' in the checkout")
