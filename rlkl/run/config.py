"""YAML files and `a.b=c` overrides → a validated configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from rlkl.errors import UserError, first_line
from rlkl.plugins import options_of
from rlkl.run.names import counterpart, did_you_mean, similar_keys
from rlkl.run.schema import PLUGINS, Config
from rlkl.run.shipped import shipped_configs
from rlkl.run.tables import TABLES

S = TypeVar("S")

RENAMED = {  # what a configuration of version 0.1 may still say → what to write now
    "model.critic": "critic.kind",
    "model.checkpointing": "model.gradient_checkpointing",
    "lora.targets": "lora.target_modules",
    "lora.full": "lora.modules_to_save",
    "optim.critic_lr": "critic.lr",
    "optim.critic_warmup": "critic.warmup",
    "sampling.unanimous": "sampling.zero_variance (keep, drop or resample)",
    "sampling.refills": "sampling.resample_rounds",
    "loss.value_coef": "critic.coef",
    "loss.value_clip": "critic.clip",
    "loss.entropy_coef": "entropy.coef",
    "loss.clip": "loss.epsilon",
    "loss.clip_high": "loss.epsilon_high",
    "task.paid": "task.method (strict or flexible)",
    "loss=ppo": (
        "loss=clip with advantage=gae and critic.kind=head (PPO and GRPO share the loss; its "
        "loss.cap is loss.delta)"
    ),
    "loss=grpo": "loss=clip with advantage=grpo (PPO and GRPO share the loss)",
    "loss=dual_clip": "loss=clip with loss.delta=3.0, which was loss.cap",
}

OF_EVERY_PLUGIN = ("name", "weight")  # `weight` is of the parts of a reward


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (PyYAML wants 1.0e-3) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        if twice := [k for k in keys if keys.count(k) > 1]:
            problem = f"the key {twice[0]!r} stands twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def load(
    argv: Sequence[str],
    tree: dict | None = None,
    schema: type[S] = Config,
    options: Mapping[str, Any] | None = None,
) -> S:
    """`load(["tiny-ppo", "mine.yaml", "loss.epsilon=0.1"])` → Config. Later arguments win.

    tree: what the arguments change; by default the defaults of `schema`. options: values by dotted
    key, which win over the arguments. Raises UserError on any mistake.
    """
    tree = overridden(defaults(schema) if tree is None else tree, argv, schema)
    for key, value in (options or {}).items():
        tree = merge(tree, nested(key, value))
    return build(tree, schema)


def overridden(tree: dict, argv: Sequence[str], schema: type = Config) -> dict:
    """A tree of plain values, changed by CONFIG.yaml files and `a.b=c`. Later arguments win."""
    for i, arg in enumerate(argv):
        if arg.startswith("-"):
            refuse_flag(arg, "".join(argv[i + 1 : i + 2]), tree, schema)
        key, equals, value = arg.partition("=")
        part = (
            nested(key, parse_yaml(value, arg)) if equals else read_yaml(config_path(arg), schema)
        )
        tree = merge(tree, part)
    return tree


def nested(key: str, value: Any) -> Any:
    """("a.b", 1) → {"a": {"b": 1}}"""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def config_path(arg: str) -> Path:
    """A YAML file, or the file of a shipped configuration, such as tiny-grpo."""
    path = Path(arg)
    return path if path.is_file() else shipped_configs().get(arg, path)


def build(tree: dict, schema: type[S] = Config) -> S:
    """A tree of plain values → Config, or another schema.

    Raises UserError naming the option, the value and the choices.
    """
    if schema is Config:
        refuse_old_names(tree)
    try:
        cfg = TypeAdapter(schema).validate_python(tree)
    except ValidationError as error:
        raise UserError(first_mistake(error, tree, schema)) from error
    refuse_unknown_options(tree, schema)
    return cfg


def defaults(schema: type = Config) -> dict:
    """Config() as a tree of plain values."""
    return asdict(schema())


def read_yaml(path: Path, schema: type = Config) -> dict:
    if not path.is_file():
        names = shipped_names(schema)
        raise UserError(
            f"{path}: no such config file (an override is written key=value); "
            + (did_you_mean(str(path), names) or f"by name there is {', '.join(names)}")
        )
    tree = parse_yaml(path.read_bytes(), str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections of key: value, got {tree!r}")
    return tree


def shipped_names(schema: type) -> list[str]:
    """The shipped configurations that are valid for `schema`."""
    names = []
    for name, path in shipped_configs().items():
        tree = parse_yaml(path.read_bytes(), str(path))
        try:
            build(merge(defaults(schema), tree), schema)
        except UserError:
            continue
        names.append(name)
    return names


def parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{where}:{place} not YAML: {problem}") from error


def refuse_flag(flag: str, following: str, tree: dict, schema: type) -> None:
    """UserError on `--lr 1e-3`, which says how it is written here.

    following: the argument after the flag, which may be its value.
    """
    name, equals, value = flag.lstrip("-").partition("=")
    if not equals and not following.startswith("-") and "=" not in following:
        value = following
    name = name.replace("-", "_")
    known = known_keys(tree, schema)
    keys = [name] if name in known else similar_keys(name, known)
    written = " or ".join(f"{key}={value or '…'}" for key in keys)
    here, _ = advice_on(name, tree, schema)
    hint = f": did you mean {written}?" if keys else f"; {here or '--help lists all'}"
    raise UserError(f"{flag}: options are written key=value, without dashes{hint}")


def refuse_old_names(tree: dict) -> None:
    """UserError where an option has the name that it had in version 0.1, with its new name."""
    used = []
    for section, options in tree.items():
        if not isinstance(options, dict):
            continue
        name = str(options.get("name", ""))
        used.append(f"{section}={name}")
        if ":" not in name:  # a user's own function has options of its own
            used += [f"{section}.{option}" for option in options]
    for old in used:
        if old in RENAMED:
            raise UserError(f"{old} has a new name: write {RENAMED[old]}")


def checked(value: Any, kind: Any, key: str) -> Any:
    """A value as one of this type. UserError where it is none."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise UserError(f"{key}={value!r}: {message[0].lower()}{message[1:]}") from error


def yaml_text(tree: dict) -> str:
    """A tree of plain values as the YAML of a configuration."""
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)


def merge(old: dict, new: Any, *, whole: bool = True) -> dict:
    """Nested update. A plug-in with another name forgets the options of the one before.

    whole: these are trees, and not sections of one. A model may be given by its name alone.
    """
    if not isinstance(new, dict):
        raise UserError(f"expected sections of key: value, got {new!r}")
    merged = dict(old)
    for key, value in new.items():
        value = as_section(value) if key in PLUGINS or (whole and key == "model") else value
        before = old.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            named = key in PLUGINS and "name" in before
            if not named or value.get("name", before["name"]) == before["name"]:
                value = merge(before, value, whole=False)
        merged[key] = value
    return merged


def as_section(value: Any) -> Any:
    """A plug-in given by its name alone, or a list of plug-ins, as sections {name: …}."""
    if isinstance(value, list):
        return [as_section(each) for each in value]
    return {"name": value} if isinstance(value, str) else value


def refuse_unknown_options(tree: dict, schema: type) -> None:
    """UserError where a built-in function is given an option that it does not have."""
    for key, section in plugin_sections(tree):
        name = str(section.get("name"))
        if name not in TABLES[key]:  # a user's own function, or a mistake that `resolve` finds
            continue
        known = options_of(TABLES[key][name])
        for option in section:
            if option not in known and option not in OF_EVERY_PLUGIN:
                takes = ", ".join(known) or "none"
                here, meant = advice_on(f"{key}.{option}", tree, schema)
                advice = f"; {here or meant}" if here or meant else ""
                raise UserError(f"{name} has no option {option!r}; it takes {takes}{advice}")


def plugin_sections(tree: dict) -> Iterator[tuple[str, dict]]:
    """(key, section) of each plug-in in a tree of plain values; one for each part of a reward."""
    for key in TABLES:
        section: Any = tree
        for part in key.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        for each in section if isinstance(section, list) else [section]:
            if isinstance(each, dict):
                yield key, each


def advice_on(key: str, tree: dict, schema: type) -> tuple[str, str]:
    """(what a name of TRL or verl is here, which of our keys may be meant): parts of a message.

    Names of TRL and verl are those of training: other commands have none.
    """
    known = known_keys(tree, schema)
    here = counterpart(key, known) if schema is Config else ""
    return here, did_you_mean(key, known)


def known_keys(tree: dict, schema: type) -> list[str]:
    """The keys of all options, those of the built-in functions that `tree` names among them."""
    known = [row[0] for row in options(schema)]
    for section, given in plugin_sections(tree):
        function = TABLES[section].get(str(given.get("name")))
        known += [f"{section}.{option}" for option in (options_of(function) if function else ())]
    return known


def first_mistake(error: ValidationError, tree: dict, schema: type = Config) -> str:
    """The first mistake that pydantic found, as one line."""
    mistake = error.errors()[0]
    where = ".".join(str(x) for x in mistake["loc"])
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section = schema
        for key in mistake["loc"][:-1]:
            section = get_type_hints(section).get(str(key), section)
        here, meant = advice_on(first_leaf(where, mistake["input"]), tree, schema)
        here = here or advice_on(where, tree, schema)[0]
        if here:
            return f"unknown key {where}; {here}"
        there_is = ", ".join(f.name for f in fields(section))
        return f"unknown key {where}; there is {there_is}" + (f"; {meant}" if meant else "")
    if not where:
        return message
    return f"{where}={mistake['input']!r}: {message[0].lower()}{message[1:]}"


def first_leaf(key: str, value: Any) -> str:
    """The dotted key of the first plain value in a tree that stands at `key`."""
    while isinstance(value, dict) and value:
        name = next(iter(value))
        key, value = f"{key}.{name}", value[name]
    return key


def options(section: type = Config, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key, type, default, description) of every option, for --help."""
    rows = []
    hints = get_type_hints(section)
    for f in fields(section):
        key = prefix + f.name
        kind = hints[f.name]
        if isinstance(kind, type) and is_dataclass(kind):
            rows += options(kind, f"{key}.")
            continue
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = default.get("name", default) if isinstance(default, dict) else default
        line = description(section, f.name)
        if names := TABLES.get(key):
            line += f": {', '.join(names)} or file.py:function"
        rows.append((key, shown_type(kind), shown_value(value), line))
    return rows


def shown_type(kind: Any) -> str:
    """The type of an option as --help prints it."""
    text = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(kind))
    text = text.replace("dict[str, Any]", "plug-in")
    text = re.sub(r"Optional\[(.*)\]$", r"\1 | null", text).replace("None", "null")
    return re.sub(r"Literal\[(.*)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), text)


def shown_value(value: Any) -> str:
    """A default as --help prints it, on one line."""
    if value is None:
        return "null"
    return repr(value) if isinstance(value, str) and len(value.split()) != 1 else str(value)


def description(section: type, name: str) -> str:
    """The line under an option in its schema."""
    for cls in section.__mro__:
        field = cls.__dict__.get("__pydantic_fields__", {}).get(name)
        if field and field.description:
            return field.description
    return ""
