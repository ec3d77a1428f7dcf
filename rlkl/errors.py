"""The one exception a user is meant to see: printed as a single line, without a traceback; the exit code is 2."""


class UserError(Exception):
    """A mistake in a config, a file or a plug-in. The message names the key, the value and the valid choices."""


class ChatError(UserError, ValueError):
    """Chat messages that no template of the tokenizer takes."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, fit to be quoted in a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def of_a_file(error: OSError) -> str:
    """What is wrong with a file or a disk: it is full, or may not be written."""
    return f"{error.filename or 'a file'}: {error.strerror or error}"
