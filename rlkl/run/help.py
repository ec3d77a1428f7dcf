"""--help: every option of a command, with those of the functions that its configuration names.

`--help` lists all. `--help optim` shows one section, `--help loss` also the names that it may have,
and `--help loss.clip` one function with its options.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence

from rlkl.errors import UserError
from rlkl.plugins import annotation, from_file, options_of
from rlkl.rewards.text import options_only, style_of
from rlkl.run import config
from rlkl.run.names import did_you_mean
from rlkl.run.schema import Config
from rlkl.run.tables import TABLES
from rlkl.run.terminal import log_line, print_help

FLAGS = {"-h", "--help"}
HINT = "--help NAME shows a section (optim), what may be named (loss), or a function (loss.clip)"
Row = tuple[str, str, str | None, str]  # key, type, default (None: it must be given), description


def asks_for_help(argv: Sequence[str]) -> bool:
    """Is --help among the arguments?"""
    return bool(FLAGS & set(argv))


def usage(command: str, names: str = "[NAME or CONFIG.yaml …]") -> str:
    """How a command is called, as the last lines above its options."""
    return f"usage: {command} {names} [key=value …]   later arguments win\n"


def show_help(argv: Sequence[str], text: str, rows: Sequence[Row]) -> None:
    """Print the text and a table of all options, or what is asked for by name behind --help.

    Raises UserError, with the names that may be meant, on one that does not exist.
    """
    behind = argv[min(argv.index(flag) for flag in FLAGS & set(argv)) :]
    topics = [x for x in behind if not x.startswith("-") and not is_configuration(x)]
    for topic in topics:
        show_topic(topic, rows)
    if not topics:
        print_help(text, [cells(row) for row in rows])
        if any(key in TABLES for key, *_ in rows):
            log_line(f"\n{HINT}")


def show_topic(topic: str, rows: Sequence[Row]) -> None:
    """Print a section, an option, the names that an option may have, or one function."""
    tables = {key: TABLES[key] for key, *_ in rows if key in TABLES}
    functions = {
        f"{key}.{name}": (key, function)
        for key, table in tables.items()
        for name, function in table.items()
    }
    found = [row for row in rows if row[0] == topic or row[0].startswith(f"{topic}.")]
    text = ""
    if topic in functions:
        key, function = functions[topic]
        text = f"{topic}: {inspect.getdoc(function)}\n"
        found = [(*row[:3], "") for row in function_options(key, function)]
    elif not found:
        keys = [key for key, *_ in rows]
        sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
        advice = did_you_mean(topic, [*sections, *keys, *functions])
        advice = advice or f"there is {', '.join(sections)}"
        raise UserError(f"--help {topic}: no such section, option or function; {advice}")
    print_help(text, [cells(row) for row in found])
    if topic in tables:
        names = [(name, first_line_of(function)) for name, function in tables[topic].items()]
        print_help(f"\n{topic} is one of these, or file.py:function", names)


# ------------------------------------------------------------------ the options


def every_option(argv: Sequence[str], schema: type = Config) -> list[Row]:
    """The options of a command; below each plug-in those of the function that is chosen.

    Raises UserError where a function of a file cannot be loaded.
    """
    given = [x for x in argv if not x.startswith("-") and is_configuration(x)]
    tree = config.overridden(config.defaults(schema), given, schema)
    chosen = [(key, str(section.get("name"))) for key, section in config.plugin_sections(tree)]
    rows: list[Row] = []
    for key, kind, default, line in config.options(schema):
        names = list(dict.fromkeys(name for chosen_key, name in chosen if chosen_key == key))
        here = f", here {' + '.join(names)}" if names and names != [default] else ""
        rows.append((key, kind, default + here, line))
        for name in names:
            rows += function_options(key, function_named(key, name))
    return rows


def is_configuration(argument: str) -> bool:
    """Is this key=value, or a configuration, and not the name of an option?"""
    return "=" in argument or argument.endswith(".yaml") or config.config_path(argument).is_file()


def function_named(key: str, name: str) -> Callable:
    """The function of a plug-in, with its options as keyword-only arguments."""
    if name in TABLES[key]:
        return TABLES[key][name]
    function = from_file(name, TABLES[key], key)
    is_text_reward = TABLES[key] is TABLES["reward"] and style_of(function) is not None
    return options_only(function) if is_text_reward else function


def function_options(key: str, function: Callable) -> Iterator[Row]:
    """The options of one function, from its signature and its docstring."""
    annotated = function.__init__ if inspect.isclass(function) else function
    doc = inspect.getdoc(function) or ""
    for name, parameter in options_of(function).items():
        kind = config.shown_type(annotation(parameter, annotated))
        required = parameter.default is parameter.empty
        default = None if required else config.shown_value(parameter.default)
        yield f"{key}.{name}", kind, default, description_in(doc, name)


def description_in(doc: str, option: str) -> str:
    """What a docstring says of an option: its own entry `option: …`, or the sentence that names it.

    An empty text where it says nothing.
    """
    entries = re.split(r"\n\n|\n(?=\w+: |Raises )", doc)
    for entry in entries:
        name, colon, text = entry.partition(": ")
        if colon and name == option:
            return one_line(text)
    sentences = [s for entry in entries for s in re.split(r"(?<=\.)\s+(?=[A-Z`])", entry)]
    naming = (sentence for sentence in sentences if f"`{option}`" in sentence)
    return one_line(next(naming, ""))


def one_line(sentence: str) -> str:
    """A sentence of a docstring on one line, without its full stop."""
    return " ".join(sentence.split()).removesuffix(".")


def cells(row: Row) -> tuple[str, str]:
    """The key of an option, and all else about it as one text."""
    key, kind, default, description = row
    value = "required" if default is None else f"default {default}"
    return key, f"{description} [{kind}, {value}]".lstrip()


def first_line_of(function: Callable) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]
