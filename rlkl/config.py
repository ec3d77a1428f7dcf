"""YAML + `a.b=c` overrides → validated dataclasses. A plug-in is `{name: …, **its keyword-only arguments}`.

This file knows no plug-in by name: `resolve` looks it up in a table, or loads `file.py:function`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError, create_model

from rlkl.errors import UserError, first_line
from rlkl.schema import PLUGINS, Config

S = TypeVar("S")


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (PyYAML wants 1.0e-3) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        if twice := [k for k in keys if keys.count(k) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def load(argv: list[str], tree: dict | None = None, schema: type[S] = Config) -> S:
    """`load(["configs/tiny-ppo.yaml", "loss.clip=0.1"])`: later arguments win, over the defaults or over `tree`.

    Raises UserError on any mistake.
    """
    tree = defaults(schema) if tree is None else tree
    for arg in argv:
        path, equals, value = arg.partition("=")
        part = read_yaml(Path(arg)) if not equals else parse_yaml(value, arg)
        for key in reversed(path.split(".") if equals else []):
            part = {key: part}
        tree = merge(tree, part)
    return build(tree, schema)


def build(tree: dict, schema: type[S] = Config) -> S:
    """A tree of plain values → Config, or another schema; UserError names the key, the value and the choices."""
    try:
        return TypeAdapter(schema).validate_python(tree)
    except ValidationError as error:
        raise UserError(explain(error, schema)) from error


def defaults(schema: type = Config) -> dict:
    """Config() as a tree of plain values."""
    return asdict(schema())


def read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path}: no such config file (an override is written key=value)")
    tree = parse_yaml(path.read_bytes(), str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections of key: value, got {tree!r}")
    return tree


def parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}:{place} not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error


def merge(old: dict, new: Any) -> dict:
    """Nested update. A plug-in may be given by its name alone; another name forgets the previous one's arguments."""
    if not isinstance(new, dict):
        raise UserError(f"expected sections of key: value, got {new!r}")
    merged = dict(old)
    for key, value in new.items():
        value = sections(value) if key in PLUGINS else value
        before = old.get(key)
        nested = isinstance(before, dict) and isinstance(value, dict)
        another = nested and key in PLUGINS and "name" in before and value.get("name", before["name"]) != before["name"]
        merged[key] = merge(before, value) if nested and not another else value
    return merged


def sections(value: Any) -> Any:
    """A plug-in that is given by its name alone, or a list of plug-ins, as sections."""
    if isinstance(value, list):
        return [sections(each) for each in value]
    return {"name": value} if isinstance(value, str) else value


def explain(error: ValidationError, schema: type = Config) -> str:
    """The first mistake as one line."""
    mistake = error.errors()[0]
    where, said = ".".join(str(x) for x in mistake["loc"]), mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section = functools.reduce(lambda t, k: get_type_hints(t).get(k, t), mistake["loc"][:-1], schema)
        return f"unknown key {where}; there is {', '.join(f.name for f in fields(section))}"
    return f"{where}={mistake['input']!r}: {said[0].lower()}{said[1:]}" if where else said


def resolve(spec: Mapping[str, Any], table: Mapping[str, Callable], key: str = "plug-in") -> functools.partial:
    """{"name": n, **options} → the function with all its options bound, defaults too, checked against its signature."""
    name = spec.get("name")
    options = {k: v for k, v in spec.items() if k != "name"}
    function = table[name] if name in table else from_file(str(name), table, key)
    known = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    known.pop("group_size", None)  # given by the loop
    if bad := sorted(set(options) - set(known)):
        raise UserError(f"{name} has no option {bad[0]!r}; it takes {', '.join(known) or 'none'}")
    target = function.__init__ if inspect.isclass(function) else function
    kinds = {n: (annotation(p, target), ... if p.default is p.empty else p.default) for n, p in known.items()}
    try:
        checked = create_model("Options", **kinds)(**options)
    except ValidationError as error:
        mistake = error.errors()[0]
        option = f"{key}.{'.'.join(map(str, mistake['loc']))}"
        if mistake["type"] == "missing":
            raise UserError(f"{name} needs {option}") from error
        raise UserError(f"{option}={mistake['input']!r}: {mistake['msg'].lower()}") from error
    return functools.partial(function, **{n: getattr(checked, n) for n in known})


def annotation(parameter: inspect.Parameter, function: Callable) -> Any:
    """The type of an option: as annotated, else that of its default."""
    if parameter.annotation is not parameter.empty:
        kind = parameter.annotation
        return eval(kind, inspect.unwrap(function).__globals__) if isinstance(kind, str) else kind
    return Any if parameter.default in (None, parameter.empty) else type(parameter.default)


def from_file(name: str, table: Mapping[str, Callable], key: str) -> Callable[..., Any]:
    """`file.py:function` or `package.module:function`."""
    where, colon, attribute = name.rpartition(":")
    if not colon:
        raise UserError(f"{key}.name={name!r}: choose {', '.join([*table, 'file.py:function'])}")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"{Path(where).stem}@{Path(where).resolve()}", where)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # so that its dataclasses find it; a name that no import can meet
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except FileNotFoundError as error:
        raise UserError(f"{key}.name={name!r}: no such file {where}") from error
    except Exception as error:  # a plug-in may fail in any way while it is loaded
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(
            f"{key}.name={name!r}: {where}{line}: {type(error).__name__}: {error}".splitlines()[0]) from error
    if not callable(getattr(module, attribute, None)):
        here = [n for n, x in vars(module).items() if callable(x) and getattr(x, "__module__", None) == module.__name__]
        raise UserError(
            f"{key}.name={name!r}: {where} has no function {attribute!r}; it has {', '.join(here) or 'none'}")
    return getattr(module, attribute)


def options(tables: Mapping[str, Mapping[str, Callable]], section: type = Config, prefix: str = ""
            ) -> list[tuple[str, str, str, str]]:
    """(key, type, default, one line) of every option, for --help; with the names in its table if it has one."""
    rows, hints = [], get_type_hints(section)
    for f in fields(section):
        kind = hints[f.name]
        if isinstance(kind, type) and is_dataclass(kind):
            rows += options(tables, kind, f"{prefix}{f.name}.")
            continue
        default = f.default if f.default_factory is MISSING else f.default_factory()
        shown = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(kind)).replace("dict[str, Any]", "plug-in")
        shown = re.sub(r"Literal\[(.*)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), shown)
        value = default["name"] if isinstance(default, dict) else default
        declared = (c.__dict__.get("__pydantic_fields__", {}).get(f.name) for c in section.__mro__)
        line = next((field.description for field in declared if field and field.description), "")
        if names := tables.get(prefix + f.name):
            line += f": {', '.join(names)} or file.py:function"
        rows.append((prefix + f.name, shown, str(value), line))
    return rows
