"""`rlkl.train`: a run that is started from Python, with functions in place of names."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

from rlkl.errors import UserError
from rlkl.plugins import given, name_given
from rlkl.run.folder import configure
from rlkl.run.session import Session
from rlkl.run.shipped import trainer


def train(config: Sequence[str], steps: int | None, options: dict[str, Any]) -> Session:
    """See `rlkl.train`."""
    if steps is not None:
        options = options | {"optim.steps": steps}
    given.clear()
    options = {key: plain(value) for key, value in options.items()}
    arguments = [*config]
    if "resume" in options:
        arguments.append(f"resume={options['resume']}")
    shown = [repr(arg) for arg in config] + [f"{key}={value!r}" for key, value in options.items()]
    try:
        return trainer().train(configure(arguments, options), f"rlkl.train({', '.join(shown)})")
    except UserError as error:  # without the exceptions that it came from
        raise error.with_traceback(None) from None


def plain(value: Any) -> Any:
    """The value as a configuration has it: functions by name, paths as text."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, PathLike):
        return fspath(value)
    return name_given(value) if callable(value) else value
