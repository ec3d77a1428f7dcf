"""`rlkl.train`: a run that is started from Python, with functions in place of names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

from rlkl.errors import UserError
from rlkl.plugins import FROM_PYTHON, PYTHON, name_given
from rlkl.run.folder import configure
from rlkl.run.session import Session
from rlkl.run.shipped import trainer


def train(config: Sequence[str], steps: int | None, options: dict[str, Any]) -> Session:
    """See `rlkl.train`. One process starts one run at a time."""
    if steps is not None:
        options = options | {"optim.steps": steps}
    if not isinstance(options.get("model", ""), str | PathLike | dict):
        raise UserError(
            "rlkl.train(model=…) takes a hub name or a folder, and loads the model itself; "
            "model.save_pretrained(FOLDER) and tokenizer.save_pretrained(FOLDER) write one"
        )
    FROM_PYTHON.clear()
    options = {key: plain(value) for key, value in options.items()}
    arguments = [argument(x) for x in config]
    if options.get("resume") is not None:
        arguments.append(f"resume={options['resume']}")
    shown = [repr(x) for x in arguments] + [f"{key}={value!r}" for key, value in options.items()]
    try:
        return trainer().train(configure(arguments, options), f"rlkl.train({', '.join(shown)})")
    except UserError as error:  # without the exceptions that it came from
        message = re.sub(rf"\.name=('?){PYTHON}:(\w+)\1", r"=\2", str(error))
        error.args = (message.replace(f"{PYTHON}:", ""),)
        raise error.with_traceback(None) from None


def argument(value: Any) -> str:
    """A positional argument as on the command line. UserError where it is no text and no path."""
    if isinstance(value, str | PathLike):
        return fspath(value)
    raise UserError(
        f"rlkl.train({value!r}): give names of configurations, files and 'a.b=c' as text, and "
        "options by name: rlkl.train('tiny-grpo', optim={'lr': 1e-4})"
    )


def plain(value: Any) -> Any:
    """The value as a configuration has it: functions by name, paths as text."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, PathLike):
        return fspath(value)
    return name_given(value) if callable(value) else value
