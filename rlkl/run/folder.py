"""The run folder: what was run, with which code, and whether it may be continued."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import platform
import re
import subprocess
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from rlkl.errors import UserError
from rlkl.plugins import FROM_PYTHON
from rlkl.run import config
from rlkl.run.live_plot import require_notebook
from rlkl.run.log import load_wandb
from rlkl.run.schema import Config

# Options, or sections, that may change when a run is resumed: its length, its log, its checkpoints.
MAY_CHANGE = ("optim.steps", "log.", "eval.every", "checkpoint.", "resume", "run")


def configure(argv: Sequence[str], options: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a command line of train.py; options: see `config.load`.

    With resume=FOLDER it is that of the run in FOLDER. Raises UserError where the folder of a new
    run exists, and where an option of a resumed run changes that may not.
    """
    folders = [arg.removeprefix("resume=") for arg in argv if arg.startswith("resume=")]
    if folders:
        cfg = configure_resumed(folders[-1], argv, options)
    else:
        cfg = config.load(argv, options=options)
    if not folders and cfg.run != "auto":
        check_new(Path(cfg.run), f"resume={cfg.run} continues it")
    load_wandb(cfg.log.wandb)  # a missing library is found before a model is loaded
    if cfg.log.plot:
        require_notebook()
    return cfg


def configure_resumed(
    folder: str, argv: Sequence[str], options: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of the run in `folder`, in which steps and logging may be changed."""
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise UserError(f"resume={folder}: no run folder: it has no config.yaml")
    tree = config.read_yaml(file)
    try:
        saved = config.build(tree)
    except UserError as error:
        message = f"resume={folder}: its config.yaml is not of this version: {error}"
        raise UserError(message) from error
    cfg = config.load(argv, tree, options=options)
    for key, (old, new) in differing(saved, cfg).items():
        if not key.startswith(MAY_CHANGE):
            raise UserError(
                f"resume={folder}: {key} was {old} and is now {new}; only optim.steps, "
                "eval.every, checkpoint.* and log.* may change"
            )
    return cfg


def differing(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: its two values} of the options in which two configurations differ.

    A value is None where a configuration has no such key.
    """
    a = flat(asdict(one))
    b = flat(asdict(other))
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} → {"a.b": 1}. The items of a list of sections are numbered from 0."""
    rows = {}
    for key, value in tree.items():
        if value and isinstance(value, list) and all(isinstance(x, dict) for x in value):
            value = dict(enumerate(value))
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def open_folder(cfg: Config, command: str) -> Path:
    """The run folder: a new one, or with `resume` the one that exists.

    command: how the run was started. Raises UserError where a plug-in's source is no longer the
    one that the run was started with.
    """
    if not cfg.resume:
        name = f"{cfg.task['name']}-{cfg.advantage['name']}".replace("/", "_").replace(":", "-")
        return make_folder(cfg, name, command, f"resume={cfg.run} continues it")
    folder = Path(cfg.resume)
    for name, (origin, source) in plugin_sources(cfg).items():
        saved = folder / "plugins" / name
        if not saved.is_file() or saved.read_bytes() != source:
            raise UserError(
                f"resume={folder}: {origin} differs from {saved}, which the run was started with: "
                "if the change is intended, write the new text into that file"
            )
    return folder


def make_folder(cfg: Any, name: str, command: str, advice: str) -> Path:
    """Make the folder `cfg.run`, or runs/NAME-1, runs/NAME-2, … where that is auto.

    It gets config.yaml, provenance.json (the command and the versions) and the plug-ins' sources.
    Raises UserError where it cannot be written, and, with `advice`, where it exists.
    """
    folder = numbered(Path("runs") / name) if cfg.run == "auto" else Path(cfg.run)
    sources = plugin_sources(cfg)
    check_new(folder, advice)
    tree = json.loads(json.dumps(asdict(cfg)))  # tuples become lists
    try:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "plugins").mkdir()
        versions = json.dumps(provenance(command), indent=1)
        (folder / "provenance.json").write_text(versions, encoding="utf-8")
        for saved_as, (_, source) in sources.items():
            (folder / "plugins" / saved_as).write_bytes(source)
        # Written last: a folder with a config.yaml can be resumed.
        text = yaml.safe_dump(tree, sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"run={folder}: cannot be written: {error.strerror}") from error
    return folder


def check_new(folder: Path, advice: str) -> None:
    """UserError with `advice` where the folder exists."""
    if folder.exists():
        raise UserError(f"run={folder}: the folder exists; a run is never overwritten: {advice}")


def plugin_sources(cfg: Any) -> dict[str, tuple[str, bytes]]:
    """{file name in the run folder: (where it is from, its text)} of the plug-ins of users.

    Raises UserError where a file cannot be read.
    """
    sources = {}
    for file, saved_as in plugin_files(cfg).items():
        try:
            sources[saved_as] = (str(file), file.read_bytes())
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    for name in flat(asdict(cfg)).values():
        if isinstance(name, str) and name in FROM_PYTHON:
            source = source_of(FROM_PYTHON[name])
            if source is not None:
                sources[name.replace(":", "-") + ".py"] = (name, source.encode())
    return sources


def source_of(function: Callable) -> str | None:
    """The text of a function or class; None where Python does not know it, and of a lambda.

    That of a lambda is the whole statement around it, which differs where a run is resumed.
    """
    if getattr(function, "__name__", "") == "<lambda>":
        return None
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None


def plugin_files(cfg: Any) -> dict[Path, str]:
    """{file: its name in the run folder} of every `file.py:function` in the configuration.

    That is the file's own name, or its path with underscores where two files have the same name.
    """
    values = flat(asdict(cfg)).values()
    matches = [re.fullmatch(r"(\S+\.py):\w+", str(value)) for value in values]
    files = dict.fromkeys(Path(match[1]) for match in matches if match)
    names = Counter(file.name for file in files)
    saved_as = {}
    for file in files:
        unique = names[file.name] == 1
        saved_as[file] = file.name if unique else "_".join(file.parts).lstrip("/_")
    return saved_as


def numbered(stem: Path, suffix: str = "") -> Path:
    """The first of stem-1, stem-2, … that does not exist, each with the suffix."""
    paths = (stem.with_name(f"{stem.name}-{number}{suffix}") for number in count(1))
    return next(path for path in paths if not path.exists())


def provenance(command: str) -> dict:
    """The command, the versions, the git revision and whether its tree was clean.

    The last two are None outside a git checkout.
    """
    libraries = ("torch", "transformers", "numpy")
    changes = git("status", "--porcelain")
    return {
        "command": command,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
        "platform": platform.platform(),
        "git": git("rev-parse", "HEAD"),
        "clean": None if changes is None else not changes,
    }


def git(*args: str) -> str | None:
    """The output of a git command in this checkout; None without git, or outside a checkout."""
    command = ["git", "-C", Path(__file__).parent, *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
