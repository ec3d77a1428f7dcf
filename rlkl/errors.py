"""Errors that a user is meant to see: one line without a traceback, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in a config, a file or a plug-in.

    The message names the option, the value and the valid choices.
    """


class ChatError(UserError, ValueError):
    """Chat messages that no template of the tokenizer accepts."""


def exit_code(command: Callable[[list[str]], object], argv: list[str]) -> int:
    """Run a command. The one place where an exception becomes one line.

    Returns 0, 2 after a UserError or an OSError (a file or a disk), 130 after Ctrl-C.
    """
    try:
        command(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, to be quoted in a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
