"""The one exception that users are meant to see."""


class UserError(Exception):
    """An error whose message is one line that names the cause and the fix; the commands print it without a traceback."""
