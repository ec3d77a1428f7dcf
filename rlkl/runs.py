"""The run folder: what was run, with which code, and whether it may be continued."""

from __future__ import annotations

import filecmp
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from rlkl import config
from rlkl.errors import UserError
from rlkl.schema import Config

MAY_CHANGE = ("optim.steps", "log.", "eval.every", "checkpoint.", "resume", "run")  # steps and logging


def configure(argv: list[str]) -> Config:
    """The config of the command line; with resume=FOLDER that of the run, which only steps and logging may change."""
    folders = [arg.removeprefix("resume=") for arg in argv if arg.startswith("resume=")]
    if not folders:
        cfg = config.load(argv)
        if cfg.run != "auto":
            check_new(Path(cfg.run), f"resume={cfg.run} continues it")
        return cfg
    saved = config.read_yaml(Path(folders[-1]) / "config.yaml")
    cfg = config.load(argv, saved)
    for key, (was, now) in differing(config.build(saved), cfg).items():
        if not key.startswith(MAY_CHANGE):
            raise UserError(f"resume={folders[-1]}: {key} was {was} and is now {now}; only optim.steps, eval.every, "
                            "checkpoint.* and log.* may change")
    return cfg


def differing(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: its two values} of the options in which two configs differ; None where there is no such key."""
    a, b = (flat(asdict(cfg)) for cfg in (one, other))
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} → {"a.b": 1}; the items of a list of sections count from 0."""
    rows = {}
    for key, value in tree.items():
        if value and isinstance(value, list) and all(isinstance(x, dict) for x in value):
            value = dict(enumerate(value))
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def open_folder(cfg: Config, argv: list[str]) -> Path:
    """Make the run folder and write down what is needed to repeat the run, or find it again on resume."""
    if not cfg.resume:
        name = f"{cfg.task['name']}-{cfg.loss['name']}".replace("/", "_").replace(":", "-")
        return make_folder(cfg, name, ["python", "train.py", *argv], f"resume={cfg.run} continues it")
    folder = Path(cfg.resume)
    for file, name in plugin_files(cfg).items():
        kept = folder / "plugins" / name
        if not filecmp.cmp(file, kept, shallow=False):
            raise UserError(f"resume={folder}: {file} differs from {kept}, which the run was started with: "
                            "copy it there if the change is meant")
    return folder


def make_folder(cfg: Any, name: str, command: list[str], instead: str) -> Path:
    """The folder `cfg.run`, or a new one of this name under runs/: what was run, on what, and the plug-ins' files.

    UserError where it exists, with what to do `instead`, and where it cannot be written.
    """
    folder, plugins = Path(cfg.run) if cfg.run != "auto" else numbered(Path("runs") / name), plugin_files(cfg)
    check_new(folder, instead)
    plain = json.loads(json.dumps(asdict(cfg)))  # tuples as lists
    try:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "plugins").mkdir()
        (folder / "provenance.json").write_text(json.dumps(provenance(" ".join(command)), indent=1), encoding="utf-8")
        for file, name in plugins.items():
            shutil.copy(file, folder / "plugins" / name)
        text = yaml.safe_dump(plain, sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")  # last: with it the run may be resumed
    except OSError as error:
        raise UserError(f"run={folder}: cannot be written: {error.strerror}") from error
    return folder


def check_new(folder: Path, instead: str) -> None:
    if folder.exists():
        raise UserError(f"run={folder}: the folder exists; a run is never overwritten: {instead}")


def plugin_files(cfg: Any) -> dict[Path, str]:
    """The file of every `file.py:function`, and what it is kept as: its name, or its path where two have one name."""
    values = (re.fullmatch(r"(\S+\.py):\w+", str(value)) for value in flat(asdict(cfg)).values())
    files = dict.fromkeys(Path(found[1]) for found in values if found)
    names = Counter(file.name for file in files)
    return {file: file.name if names[file.name] == 1 else "_".join(file.parts).lstrip("/_") for file in files}


def numbered(stem: Path, suffix: str = "") -> Path:
    """The first of stem-1, stem-2, … that does not exist, each with the suffix."""
    paths = (stem.with_name(f"{stem.name}-{number}{suffix}") for number in count(1))
    return next(path for path in paths if not path.exists())


def provenance(command: str) -> dict:
    """The command, the versions, the git revision and whether the tree was clean (None outside a git checkout)."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    revision, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"command": command, "python": platform.python_version(), **versions,
            "platform": platform.platform(), "git": revision, "clean": None if changes is None else not changes}


def git(*args: str) -> str | None:
    """What git says of this checkout; None without git, or outside one."""
    try:
        done = subprocess.run(["git", "-C", Path(__file__).parent, *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
