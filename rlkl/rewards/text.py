"""Rewards that read only text: plain ones, TRL's and verl's, told apart by their parameter names.

    plain   score(example, response) -> float | {part: float} | None, like the score of a task
    TRL     f(prompts, completions, completion_ids, trainer_state, **columns) -> [float | None],
            one call for all responses; log_extra and log_metric are there, and do nothing
    verl    compute_score(data_source, solution_str, ground_truth, extra_info=None)
            -> float | {"score": float}

Each may be `async def`. Other arguments with a default are options. This file runs in the workers
of the pool; only plain numbers and strings leave it, whatever the function raises or gives.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import random
import reprlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from rlkl.errors import UserError
from rlkl.plugins import from_file, options_of, resolve
from rlkl.types import Example


class Row(NamedTuple):
    """What a text reward may read of one response."""

    example: Example
    response: str
    ids: Sequence[int] = ()  # the response's tokens, including the EOS


class TextReward(NamedTuple):
    """A loaded text reward: call(function, rows, trainer_state) -> one value per row."""

    function: Callable[..., Any]  # with its options bound
    call: Callable[..., list[Any]]
    all_rows: bool  # one call for all rows; else one call per row


# The named parts of a score; None: not applicable; text: what went wrong.
Value = dict[str, float] | None | str


# ------------------------------------------------------------------ the three styles


def call_trl(
    function: functools.partial, rows: Sequence[Row], trainer_state: SimpleNamespace
) -> list[Any]:
    """One call for all rows, with the dataset's columns as keyword arguments.

    Where a prompt is a chat, its completion is a list of one message.
    """
    completions = []
    for row in rows:
        if isinstance(row.example.prompt, str):
            completions.append(row.response)
        else:
            completions.append([{"role": "assistant", "content": row.response}])
    arguments = columns([row.example for row in rows]) | {
        "prompts": [row.example.prompt for row in rows],
        "completions": completions,
        "completion_ids": [row.ids for row in rows],
        "trainer_state": trainer_state,
        "log_extra": no_log,
        "log_metric": no_log,
    }
    values = call(function, **accepted_arguments(function, arguments))
    if not isinstance(values, Sequence) and not hasattr(values, "tolist"):
        raise TypeError(f"it gave a {type(values).__name__}, not a list")
    values = list(values)
    if len(values) != len(rows):
        raise ValueError(f"it gave {len(values)} scores for {len(rows)} completions")
    return values


def no_log(*args: Any, **kwargs: Any) -> None:
    """TRL's log_extra and log_metric."""


def call_verl(
    function: functools.partial, rows: Sequence[Row], trainer_state: SimpleNamespace
) -> list[Any]:
    """One call for one row; the answer is `ground_truth`."""
    example = rows[0].example
    arguments = {
        "data_source": example.info.get("data_source", ""),
        "solution_str": rows[0].response,
        "ground_truth": example.answer,
        "extra_info": example.info.get("extra_info", example.info),
    }
    value = call(function, **accepted_arguments(function, arguments))
    return [value["score"] if isinstance(value, dict) else value]


def call_plain(
    function: Callable[..., Any], rows: Sequence[Row], trainer_state: SimpleNamespace
) -> list[Any]:
    """function(example, response) of one row."""
    return [call(function, rows[0].example, rows[0].response)]


STYLES = {  # a parameter that only this style has → how it is called, and whether once for all rows
    "completions": (call_trl, True),
    "completion_ids": (call_trl, True),
    "solution_str": (call_verl, False),
    "response": (call_plain, False),
    "reply": (call_plain, False),  # the old name of `response`; functions that use it still work
}


ARGUMENTS = {  # what the three styles pass, beside the columns of the dataset; the rest are options
    *("example", "response", "reply"),
    *("prompts", "completions", "completion_ids", "trainer_state", "answer"),
    *("log_extra", "log_metric"),
    *("data_source", "solution_str", "ground_truth", "extra_info"),
}


def style_of(function: Callable[..., Any]) -> tuple[Callable[..., list[Any]], bool] | None:
    """How a text reward is called; None for a reward that takes the Batch."""
    parameters = inspect.signature(function).parameters
    return next((style for name, style in STYLES.items() if name in parameters), None)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's value; a coroutine is awaited."""
    value = function(*args, **kwargs)
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The dataset's columns as TRL passes them: the answer and the keys of Example.info.

    One value per response, None where an example does not have the key. Without `answer` where no
    example has one.
    """
    keys = dict.fromkeys(key for e in examples for key in e.info)
    names = [key for key in keys if key not in ("prompt", "completion")]
    by_name = {name: [e.info.get(name) for e in examples] for name in names}
    answers = [e.answer for e in examples]
    return ({"answer": answers} if any(e.has_answer for e in examples) else {}) | by_name


def accepted_arguments(function: functools.partial, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function takes. An option that is set stays as it is set.

    Raises UserError if it needs one that is not there, for example a column of another dataset.
    """
    parameters = inspect.signature(function.func.__wrapped__).parameters.values()
    for p in parameters:
        required = p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        if required and p.name not in arguments and p.name not in function.keywords:
            raise UserError(
                f"the reward {name_of(function)} needs {p.name!r}; there is {', '.join(arguments)}"
            )
    names = {p.name for p in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names |= arguments.keys()
    names -= function.keywords.keys()
    return {name: x for name, x in arguments.items() if name in names}


def name_of(function: functools.partial) -> str:
    """The name of a reward whose options are bound."""
    return getattr(function.func, "__name__", type(function.func).__name__)


# ------------------------------------------------------------------ loading


def load_reward(spec: Mapping[str, Any]) -> TextReward | None:
    """The text reward that a section names; None if it takes the Batch.

    Raises UserError as `resolve` does.
    """
    name = str(spec["name"])
    function = from_file(name, {}, "reward")
    style = style_of(function)
    check_arguments(name, function, style and style[0])
    if style is None:
        return None
    resolved = resolve(spec, {name: options_only(function)}, "reward")
    # Only what is set is bound: an argument with a default may also be a column of the dataset.
    options = {key: x for key, x in resolved.keywords.items() if key in spec}
    return TextReward(functools.partial(resolved.func, **options), *style)


def check_arguments(name: str, function: Callable[..., Any], call: Callable | None) -> None:
    """UserError where a reward that is called by position has other arguments.

    call: that of its style; None for a reward that takes the Batch.
    """
    parameters = inspect.signature(function).parameters
    options = options_of(function)
    positional = [p for p in parameters.values() if p.name not in options]
    if call is call_plain:
        names = [p.name for p in positional[:2]]
        fits = names in (["example", "response"], ["example", "reply"]) and takes(positional, 2)
    else:
        fits = call is not None or takes(positional, 3)
    if not fits:
        raise UserError(
            f"reward.name={name}: its arguments ({', '.join(parameters)}) are those of no reward: "
            "name them (example, response); or (completions, …) with columns of the dataset, as in "
            "TRL; or (data_source, solution_str, ground_truth), as in verl; or (examples, "
            "responses, batch)"
        )


def takes(parameters: Sequence[inspect.Parameter], count: int) -> bool:
    """May a function with these parameters be called with `count` positional arguments?"""
    try:
        inspect.Signature(parameters).bind(*range(count))
    except TypeError:
        return False
    return True


def load_task(spec: Mapping[str, Any]) -> TextReward:
    """The score of a task from a file."""
    task = resolve(spec, {}, "task")("train")
    return TextReward(task.score, call_plain, all_rows=False)


def options_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its options as its whole signature, keyword-only as `resolve` reads them.

    They are the arguments with a default that no style passes, wherever they stand.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    options = [
        p.replace(kind=p.KEYWORD_ONLY)
        for p in inspect.signature(function).parameters.values()
        if p.kind is not p.POSITIONAL_ONLY and p.default is not p.empty and p.name not in ARGUMENTS
    ]
    signature = inspect.Signature(options)
    wrapper.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return wrapper


# ------------------------------------------------------------------ scoring


def score_rows(
    reward: TextReward, rows: Sequence[Row], trainer_state: SimpleNamespace
) -> list[Value]:
    """One value per row.

    A function that fails on one response fails on that one alone, unless it scores all rows at
    once. Before each call `random` is seeded by the response, so that it does not matter which
    worker makes the call.
    """
    calls = [list(rows)] if reward.all_rows else [[row] for row in rows]
    values: list[Value] = []
    for call_rows in calls:
        seed = f"{trainer_state.global_step} {call_rows[0].response!r}"
        random.seed(zlib.crc32(seed.encode()))
        try:
            given = reward.call(reward.function, call_rows, trainer_state)
            values += [parse_value(value) for value in given]
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # user code may fail in any way
            values += [describe_error(error)] * len(call_rows)
    return values


def parse_value(value: Any) -> Value:
    """Named numbers, without the parts that are None; None if nothing is left.

    Text that describes the value if it is not a number.
    """
    try:
        if value is None:
            return None
        parts = value if isinstance(value, dict) else {"score": value}
        numbers = {str(name): number(x) for name, x in parts.items() if x is not None}
    except Exception:  # reading an object may fail in any way
        return f"gave no number but a {type(value).__name__}: {short_repr(value)}"
    return numbers or None


def number(x: Any) -> float:
    """A finite float. Raises ValueError on text, and on anything else that is not a number."""
    if isinstance(x, str | bytes) or not math.isfinite(float(x)):
        raise ValueError
    return float(x)


def describe_error(error: BaseException) -> str:
    """Type and message of an exception; its str() may fail too."""
    try:
        message = str(error)
    except Exception:
        message = "its message cannot be read"
    return f"raised {type(error).__name__}: {message[:200]!r}"


def short_repr(value: Any) -> str:
    """A short repr of any object."""
    try:
        return reprlib.repr(value)
    except Exception:  # for example, an int of more digits than Python converts
        return "too long to show"


# ------------------------------------------------------------------ in a worker of the pool

LOADED: list[TextReward | Exception] = []


def load_all(sources: Sequence[tuple[Callable, Mapping[str, Any]]]) -> None:
    """Load every source in this worker, before the clock of its first call runs."""
    for loader, spec in sources:
        try:
            LOADED.append(loader(spec))
        except Exception as error:  # raised by the first call: the run itself could load it
            LOADED.append(error)


def score_in_worker(index: int, rows: Sequence[Row], trainer_state: SimpleNamespace) -> list[Value]:
    """`score_rows` by the source of that index. Only values and a UserError come out of it."""
    reward = LOADED[index]
    if isinstance(reward, Exception):
        raise UserError(f"a worker process cannot load it: {reward}")
    try:
        return score_rows(reward, rows, trainer_state)
    except UserError:
        raise
    except BaseException as error:
        return [describe_error(error)] * len(rows)
