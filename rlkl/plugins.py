"""Plug-ins: plain functions that the configuration names; their keyword arguments are options.

A section `{name: …, **options}` names an entry of a table, or `file.py:function`, or
`package.module:function`. `resolve` returns the function with its options bound. A function that
is given to `rlkl.train` has the name `python:function`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlkl.errors import UserError

GIVEN_BY_THE_LOOP = {"group_size"}  # keyword-only arguments that are not options
PYTHON = "python"  # stands for a file in the name of a function that was given from Python
FROM_PYTHON: dict[str, Callable] = {}  # those functions, by name; see `name_given`


def resolve(
    spec: Mapping[str, Any], table: Mapping[str, Callable], key: str = "plug-in"
) -> functools.partial:
    """The function that `spec` names, with all its options bound, defaults too.

    key: where the section is in the configuration, for error messages. Raises UserError on an
    unknown name, an unknown option, and a value of the wrong type.
    """
    name = str(spec.get("name"))
    given = {k: v for k, v in spec.items() if k != "name"}
    function = table[name] if name in table else from_file(name, table, key)
    known = options_of(function)
    if unknown := sorted(set(given) - set(known)):
        takes = ", ".join(known) or "none"
        raise UserError(f"{name} has no option {unknown[0]!r}; it takes {takes}")
    target = function.__init__ if inspect.isclass(function) else function
    options = {
        n: option_value(f"{key}.{n}", p, annotation(p, target), given, name)
        for n, p in known.items()
    }
    return functools.partial(function, **options)


def option_value(
    key: str, parameter: inspect.Parameter, kind: Any, given: Mapping[str, Any], name: str
) -> Any:
    """The value of an option of the plug-in `name`: the given one, checked, or its default.

    Raises UserError where it is of another type than `kind`, and where there is none.
    """
    if parameter.name not in given:
        if parameter.default is parameter.empty:
            raise UserError(f"{name} needs {key}")
        return parameter.default
    try:
        return TypeAdapter(kind).validate_python(given[parameter.name])
    except ValidationError as error:
        mistake = error.errors()[0]
        option = ".".join([key, *map(str, mistake["loc"])])
        raise UserError(f"{option}={mistake['input']!r}: {mistake['msg'].lower()}") from error


def options_of(function: Callable) -> dict[str, inspect.Parameter]:
    """The options of a plug-in, by name: its keyword-only arguments."""
    return {
        p.name: p
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN_BY_THE_LOOP
    }


def annotation(parameter: inspect.Parameter, function: Callable) -> Any:
    """The type of an option: its annotation, else the type of its default.

    Any where it cannot be checked, such as a name that only a type checker knows.
    """
    kind = parameter.annotation
    if kind is parameter.empty:
        kind = type(parameter.default)
    if kind in (type(None), type):  # no default, or None: nothing is known
        return Any
    try:
        if isinstance(kind, str):
            kind = eval(kind, inspect.unwrap(function).__globals__)
        TypeAdapter(kind)
    except Exception:  # a user may annotate in any way
        return Any
    return kind


def from_file(name: str, table: Mapping[str, Callable], key: str) -> Callable[..., Any]:
    """The function of `file.py:function` or `package.module:function`.

    Raises UserError where there is no such file or function, or where loading it fails.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon:
        raise UserError(f"{key}.name={name!r}: choose {', '.join([*table, 'file.py:function'])}")
    if is_given(name):
        if name not in FROM_PYTHON:
            raise UserError(
                f"{key}.name={name!r}: {attribute} was given to rlkl.train as a function and is in "
                f"no file: give it to rlkl.train again, or name a file: {key}=file.py:{attribute}"
            )
        return FROM_PYTHON[name]
    try:
        module = load_module(where)
    except FileNotFoundError as error:
        raise UserError(f"{key}.name={name!r}: no such file {where}") from error
    except Exception as error:  # user code may fail in any way while it is loaded
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        message = f"{key}.name={name!r}: {where}{line}: {type(error).__name__}: {error}"
        raise UserError(message.splitlines()[0]) from error
    if not callable(getattr(module, attribute, None)):
        own = [
            n
            for n, x in vars(module).items()
            if callable(x) and getattr(x, "__module__", None) == module.__name__
        ]
        has = ", ".join(own) or "none"
        raise UserError(f"{key}.name={name!r}: {where} has no function {attribute!r}; it has {has}")
    return getattr(module, attribute)


def name_given(function: Callable) -> str:
    """The name that a function from Python has in a configuration; `resolve` finds it by that.

    A number is added where another function has the name.
    """
    own = getattr(function, "__name__", type(function).__name__).strip("<>")
    name = f"{PYTHON}:{own}"
    number = 1
    while FROM_PYTHON.setdefault(name, function) is not function:
        number += 1
        name = f"{PYTHON}:{own}_{number}"
    return name


def is_given(name: str) -> bool:
    """Is this the name of a function from Python?"""
    return name.startswith(f"{PYTHON}:")


def load_module(where: str) -> Any:
    """Import `file.py`, or `package.module`, which may lie in the working directory."""
    if not where.endswith(".py"):
        if os.getcwd() not in sys.path:  # it is there for `python -m rlkl`, not for `rlkl`
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(where)
    unique = f"{Path(where).stem}@{Path(where).resolve()}"  # a name that no import can have
    spec: Any = importlib.util.spec_from_file_location(unique, where)
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module
