"""Rewards that read text alone: yours, TRL's or verl's, told apart by the name of a parameter.

yours   score(example, reply) -> float | {part: float} | None, as a task's score
TRL     f(prompts, completions, completion_ids, trainer_state, **columns) -> [float | None], one call for all replies
verl    compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | {"score": float}

Any of them may be `async def`. Keyword-only arguments with a default are its options. This file runs in the workers of
the pool: what leaves it is plain numbers and strings, whatever the function raised or gave.
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

from rlkl.config import from_file, resolve
from rlkl.errors import UserError
from rlkl.types import Example


class Row(NamedTuple):
    """What a text reward may know of one reply."""

    example: Example
    reply: str
    ids: Sequence[int] = ()  # its tokens, the EOS too


class Text(NamedTuple):
    """A loaded text reward: call(function, rows, trainer_state) -> one value per row."""

    function: Callable[..., Any]  # its options bound
    call: Callable[..., list[Any]]
    together: bool  # one call for all rows, or one for each


Value = dict[str, float] | None | str  # named parts of a score; not applicable; or in words, what went wrong


def from_trl(function: functools.partial, rows: Sequence[Row], trainer_state: SimpleNamespace) -> list[Any]:
    chat = [not isinstance(row.example.prompt, str) for row in rows]
    spoken = [[{"role": "assistant", "content": r.reply}] if c else r.reply for r, c in zip(rows, chat, strict=True)]
    given = columns([row.example for row in rows]) | {
        "prompts": [row.example.prompt for row in rows], "completions": spoken,
        "completion_ids": [row.ids for row in rows], "trainer_state": trainer_state}
    values = finished(function, **accepted(function, given))
    if not isinstance(values, Sequence) and not hasattr(values, "tolist"):
        raise TypeError(f"it gave a {type(values).__name__}, not a list")
    values = list(values)
    if len(values) != len(rows):
        raise ValueError(f"it gave {len(values)} scores for {len(rows)} completions")
    return values


def from_verl(function: functools.partial, rows: Sequence[Row], trainer_state: SimpleNamespace) -> list[Any]:
    info = rows[0].example.info
    given = {"data_source": info.get("data_source", ""), "solution_str": rows[0].reply,
             "ground_truth": rows[0].example.answer, "extra_info": info.get("extra_info", info)}
    value = finished(function, **accepted(function, given))
    return [value["score"] if isinstance(value, dict) else value]


def of_a_reply(function: Callable[..., Any], rows: Sequence[Row], trainer_state: SimpleNamespace) -> list[Any]:
    return [finished(function, rows[0].example, rows[0].reply)]


STYLES = {  # a parameter that only this style has → how it is called, and whether once for all replies
    "completions": (from_trl, True), "completion_ids": (from_trl, True), "solution_str": (from_verl, False),
    "reply": (of_a_reply, False)}


def style_of(function: Callable[..., Any]) -> tuple[Callable[..., list[Any]], bool] | None:
    """How a text reward is called; None for a reward that takes the Batch."""
    names = inspect.signature(function).parameters
    return next((style for name, style in STYLES.items() if name in names), None)


def load_reward(spec: Mapping[str, Any]) -> Text | None:
    """The text reward a section names; None if it takes the Batch. UserError as resolve."""
    name = str(spec["name"])
    function = from_file(name, {}, "reward")
    if (style := style_of(function)) is None:
        return None
    return Text(resolve(spec, {name: with_options(function)}, "reward"), *style)


def load_task(spec: Mapping[str, Any]) -> Text:
    """The score of a task from a file."""
    return Text(resolve(spec, {}, "task")("train").score, of_a_reply, together=False)


def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a signature of its options alone: what else it takes is given to it by name."""
    kept = [p for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
    shown = functools.wraps(function)(lambda *args, **given: function(*args, **given))
    shown.__signature__ = inspect.Signature(kept)  # pyright: ignore[reportAttributeAccessIssue]
    return shown


def accepted(function: functools.partial, given: dict[str, Any]) -> dict[str, Any]:
    """Of what is given, what the function takes. UserError if it needs a column that is not there."""
    taken = inspect.signature(function.func.__wrapped__).parameters.values()
    if lacking := [p.name for p in taken if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                   and p.name not in {**given, **function.keywords}]:
        raise UserError(f"it needs {lacking[0]!r}; there is {', '.join(given)}")
    every = any(p.kind is p.VAR_KEYWORD for p in taken)
    return {name: x for name, x in given.items() if every or name in {p.name for p in taken}}


def columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The dataset as TRL hands it over: the answer and the keys of Example.info, one value per reply, None without."""
    names = dict.fromkeys(name for e in examples for name in e.info if name not in ("prompt", "completion"))
    return {"answer": [e.answer for e in examples]} | {name: [e.info.get(name) for e in examples] for name in names}


def finished(function: Callable[..., Any], *args: Any, **given: Any) -> Any:
    value = function(*args, **given)
    return asyncio.run(value) if inspect.iscoroutine(value) else value


# Whatever happens, values
def score(text: Text, rows: Sequence[Row], trainer_state: SimpleNamespace) -> list[Value]:
    """One value per row. A function that fails on one reply fails on that one alone, unless it judges them together."""
    calls = [list(rows)] if text.together else [[row] for row in rows]
    values: list[Value] = []
    for some in calls:
        random.seed(zlib.crc32(f"{trainer_state.global_step} {some[0].reply!r}".encode()))  # whichever worker it is
        try:
            values += [checked(value) for value in text.call(text.function, some, trainer_state)]
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # somebody else's code may fail in any way
            values += [raised(error)] * len(some)
    return values


def checked(value: Any) -> Value:
    """A number, or named numbers, None left out; else what it is, in words."""
    try:
        if value is None:
            return None
        parts = value if isinstance(value, dict) else {"score": value}
        numbers = {str(name): number(x) for name, x in parts.items() if x is not None}
    except Exception:  # an object may fail in any way when it is read
        return f"gave no number but a {type(value).__name__}: {shortened(value)}"
    return numbers or None


def number(x: Any) -> float:
    if isinstance(x, str | bytes) or not math.isfinite(float(x)):
        raise ValueError
    return float(x)


def raised(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:
        message = "its message cannot be read"
    return f"raised {type(error).__name__}: {message[:200]!r}"


def shortened(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # such as a number of more digits than Python converts
        return "too long to show"


# In a worker
LOADED: list[Text | Exception] = []


def prepare(sources: Sequence[tuple[Callable, Mapping[str, Any]]]) -> None:
    """Load before the clock of the first call runs."""
    for loader, spec in sources:
        try:
            LOADED.append(loader(spec))
        except Exception as error:  # it could be loaded once already, in the run itself
            LOADED.append(error)


def work(index: int, rows: Sequence[Row], trainer_state: SimpleNamespace) -> list[Value]:
    """`score` by the source of that index; nothing but values and a UserError comes out of it."""
    text = LOADED[index]
    if isinstance(text, Exception):
        raise UserError(f"a process of its own cannot load it: {text}")
    try:
        return score(text, rows, trainer_state)
    except UserError:
        raise
    except BaseException as error:
        return [raised(error)] * len(rows)
