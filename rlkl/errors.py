"""The one exception a user is meant to see: printed as a single line, without a traceback; the exit code is 2."""


class UserError(Exception):
    """A mistake in a config, a file or a plug-in. The message names the key, the value and the valid choices."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, fit to be quoted in a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
