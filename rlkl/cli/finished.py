"""What the commands about a run share: reading their arguments, finding the run, its checkpoints, its two policies."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from rlkl import checkpoint, config, lora, runs
from rlkl.build import dtype_of, model_name
from rlkl.config import resolve
from rlkl.errors import UserError
from rlkl.model import Policy, load, reference_of
from rlkl.schema import Config
from rlkl.tasks import TASKS
from rlkl.terminal import console, usage

S = TypeVar("S")
SHOWN = 8  # runs, or steps, that an error lists


class Run(NamedTuple):
    """A run of train.py."""

    folder: Path
    tree: dict[str, Any]  # of its config.yaml
    cfg: Config
    chosen: Path | None = None  # the checkpoint, if that is what was named


def parse(argv: Sequence[str], command: str, names: str) -> tuple[list[str], list[str]]:
    """(paths, key=value …) of the arguments of a command that takes `names`: "RUN OUT", or "RUN [RUN …]"."""
    paths = [a for a in argv if "=" not in a or Path(a).is_dir()]
    if unknown := [a for a in paths if a.startswith("-")]:
        raise UserError(f"rlkl {command} has no option {unknown[0]!r}: usage: rlkl {command} {names} [key=value …]")
    if not paths or ("…" not in names and len(paths) != len(names.split())):
        found = f"it was given {', '.join(paths)}" if paths else f"a run is missing; {runs_here()}"
        raise UserError(f"usage: rlkl {command} {names} [key=value …]; {found}")
    return paths, [a for a in argv if a not in paths]


def asked_for_help(argv: Sequence[str], command: str, names: str, doc: str, options: list[tuple[str, str, str, str]]
                   ) -> bool:
    """Is --help among the arguments? Then it has been printed."""
    if wanted := bool({"-h", "--help"} & set(argv)):
        usage(doc, options, f"rlkl {command}", names)
    return wanted


def find(path: str) -> Run:
    """The run in a folder, or that of a checkpoint's folder. UserError naming the runs that there are."""
    folder = Path(path)
    chosen = folder if (folder / "state.json").is_file() else None
    folder = Path(os.path.normpath(folder / ".." / "..")) if chosen else folder
    if not folder.is_dir():
        raise UserError(f"{path}: no such run; {runs_here()}")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{path}: not the folder of a run, there is no {folder / 'config.yaml'}; {runs_here()}")
    tree = config.read_yaml(folder / "config.yaml")
    if not isinstance(tree.get("checkpoint"), dict):
        trained = f"; its model is an ordinary Hugging Face directory, {folder / 'model'}"
        raise UserError(f"{path}: not a run of train.py{trained if (folder / 'model').is_dir() else ''}")
    try:
        return Run(folder, tree, config.build(tree), chosen)
    except UserError as error:
        raise UserError(f"{path}: its config.yaml is not one of this version: {error}") from error


def runs_here() -> str:
    found = sorted(str(p.parent) for p in Path("runs").glob("*/config.yaml"))
    return f"there is {listed(found)}" if found else "there is no run under runs/"


def listed(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def checkpoint_of(run: Run, step: str) -> Path:
    """The folder of a step: a number, "last" or "best". UserError naming the steps that there are."""
    if run.chosen is not None:
        if step != "last":
            raise UserError(f"step={step}: {run.chosen} is one checkpoint already; with {run.folder} step chooses")
        return run.chosen
    steps = {str(int(p.name[5:])): p for p in sorted((run.folder / "checkpoints").glob("step-*"))}
    if not steps:
        raise UserError(f"{run.folder}: no checkpoint yet; one is written at the end, and every checkpoint.every="
                        f"{run.cfg.checkpoint.every} steps")
    names = {"last": list(steps)[-1]}
    if (best := state_of(steps[names["last"]])["best_step"]) is not None:
        names["best"] = str(best)
    if names.get(step, step) not in steps:
        why = f", no held-out evaluation came yet (eval.every={run.cfg.eval.every})" if step == "best" else ""
        raise UserError(f"step={step}: {run.folder} has no such checkpoint{why}; there is {listed([*steps, *names])}")
    return steps[names.get(step, step)]


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def newest_state(run: Run) -> dict[str, Any] | None:
    folder = checkpoint.newest(run.folder)
    return None if folder is None else state_of(folder)


def kept(run: Run, plugin: dict[str, Any]) -> dict[str, Any]:
    """A plug-in from a file as the run keeps it, however the file was changed or moved since."""
    file, colon, function = plugin["name"].rpartition(":")
    copy = run.folder / "plugins" / runs.plugin_files(run.cfg).get(Path(file), "")
    return plugin | {"name": f"{copy}:{function}"} if colon and file.endswith(".py") and copy.is_file() else plugin


def both(cfg: Config, folder: Path, device: torch.device) -> tuple[Any, Policy, Policy]:
    """Tokenizer, the policy that training started from, and that of a checkpoint: less than the training itself held.

    An adapter is put beside its base as in training, not merged: the same numbers to the bit.
    """
    dtype = dtype_of(cfg, device)
    task = resolve(cfg.task, TASKS, "task")("train") if cfg.model.name == "tiny" else None  # which made the base
    before, tokenizer = load(model_name(cfg.model.name, console, task), device=device, dtype=dtype)
    if cfg.lora.r:
        after = before
        lora.adapt(after.lm, **asdict(cfg.lora))
        lora.restore(after.lm, folder)
        return tokenizer, reference_of(after), after.eval()
    return tokenizer, before, load(str(folder), device=device, dtype=dtype)[0]
