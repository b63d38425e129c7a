"""The one exception that users are meant to see."""


class UserError(Exception):
    """An error whose message is one line that names the cause and the fix; the commands print it without a traceback."""


def needs_extra(what: str, extra: str) -> UserError:
    """What to raise where a package of an extra of pyproject.toml is missing."""
    return UserError(f"{what} needs the extra `{extra}`: uv sync --extra {extra}, or pip install '.[{extra}]' in the checkout")
