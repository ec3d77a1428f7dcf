"""What the commands about a run share: arguments, run folders, checkpoints, the two policies."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlkl.errors import UserError
from rlkl.plugins import resolve
from rlkl.policy import lora
from rlkl.policy.model import load
from rlkl.policy.policy import Policy, reference_of
from rlkl.run import checkpoint, config
from rlkl.run import folder as run_folder
from rlkl.run.build import dtype_of, model_name
from rlkl.run.help import Row, asks_for_help, show_help
from rlkl.run.help import usage as usage_of
from rlkl.run.schema import Config
from rlkl.tasks import TASKS

LISTED = 8  # runs, or steps, that an error message lists


class Run(NamedTuple):
    """A run of train.py."""

    folder: Path
    tree: dict[str, Any]  # its config.yaml
    cfg: Config
    checkpoint: Path | None = None  # where the folder of a checkpoint was given


class Policies(NamedTuple):
    """The policy that training started from, and the one of a checkpoint."""

    tokenizer: Any
    before: Policy
    after: Policy


# ------------------------------------------------------------------ arguments


def parse(argv: Sequence[str], command: str, usage: str) -> tuple[list[str], list[str]]:
    """(paths, overrides): the arguments of a command, and among them those of the form key=value.

    usage: the paths that the command takes, as in "RUN OUT" or "RUN [RUN …]". Raises UserError on
    an unknown flag and on a wrong number of paths.
    """
    paths = [a for a in argv if "=" not in a or Path(a).is_dir()]
    line = f"usage: rlkl {command} {usage} [key=value …]"
    for path in paths:
        if path.startswith("-"):
            raise UserError(f"rlkl {command} has no option {path!r}: {line}")
    if not paths:
        raise UserError(f"{line}; a run is missing; {existing_runs()}")
    if "…" not in usage and len(paths) != len(usage.split()):
        raise UserError(f"{line}; it was given {', '.join(paths)}")
    return paths, [a for a in argv if a not in paths]


def help_printed(
    argv: Sequence[str],
    command: str,
    usage: str,
    doc: str,
    options: Sequence[Row],
) -> bool:
    """Print the help of a command if --help is among its arguments. Was it printed?"""
    if not asks_for_help(argv):
        return False
    show_help(argv, f"{doc}\n{usage_of(f'rlkl {command}', usage)}", options)
    return True


# ------------------------------------------------------------------ runs and checkpoints


def find_run(path: str) -> Run:
    """The run in a folder, or the run of a checkpoint's folder.

    Raises UserError, with the runs that exist, where there is none or it is of another version.
    """
    folder = Path(path)
    is_checkpoint = (folder / "state.json").is_file()
    given_checkpoint = folder if is_checkpoint else None
    if is_checkpoint:
        folder = Path(os.path.normpath(folder / ".." / ".."))
    if not folder.is_dir():
        raise UserError(f"{path}: no such run; {existing_runs()}")
    config_path = folder / "config.yaml"
    if not config_path.is_file():
        raise UserError(
            f"{path}: not the folder of a run, there is no {config_path}; {existing_runs()}"
        )
    tree = config.read_yaml(config_path)
    if not is_of_train(tree):
        message = f"{path}: not a run of train.py"
        if (folder / "model").is_dir():
            message += f"; its model is an ordinary Hugging Face directory, {folder / 'model'}"
        raise UserError(message)
    try:
        return Run(folder, tree, config.build(tree), given_checkpoint)
    except UserError as error:
        raise UserError(f"{path}: its config.yaml is not of this version: {error}") from error


def is_of_train(tree: dict) -> bool:
    """Is this a configuration of train.py? Those of rlkl sft, dpo and reward-model are others."""
    return isinstance(tree.get("checkpoint"), dict)


def existing_runs() -> str:
    """The end of a message: which runs there are."""
    folders = []
    for path in sorted(Path("runs").glob("*/config.yaml")):
        with suppress(UserError):  # what cannot be read is not offered
            if is_of_train(config.read_yaml(path)):
                folders.append(str(path.parent))
    return f"there is {listed(folders)}" if folders else "there is no run under runs/"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(names[:LISTED])
    return f"{text} and {len(names) - LISTED} more" if len(names) > LISTED else text


def find_checkpoint(run: Run, step: str) -> Path:
    """The folder of a checkpoint.

    step: a number, "last" or "best". Raises UserError, with the steps that exist, where there is
    none.
    """
    if run.checkpoint is not None:
        if step != "last":
            raise UserError(
                f"step={step}: {run.checkpoint} is one checkpoint already; to choose another, name "
                f"the run: {run.folder}"
            )
        return run.checkpoint
    folders = {str(int(p.name.removeprefix("step-"))): p for p in checkpoint_folders(run)}
    if not folders:
        every = run.cfg.checkpoint.every
        and_every = f", and every checkpoint.every={every} steps" if every else ""
        raise UserError(f"{run.folder}: no checkpoint yet; one is written at the end{and_every}")
    steps = list(folders)
    aliases = {"last": steps[-1]}
    best_step = read_state(folders[steps[-1]])["best_step"]
    if best_step is not None:
        aliases["best"] = str(best_step)
    number = aliases.get(step, step)
    if number not in folders:
        reason = ""
        if step == "best":
            reason = f", no held-out evaluation came yet (eval.every={run.cfg.eval.every})"
        raise UserError(
            f"step={step}: {run.folder} has no such checkpoint{reason}; there is "
            f"{listed([*steps, *aliases])}"
        )
    return folders[number]


def checkpoint_folders(run: Run) -> list[Path]:
    """From the first to the last."""
    return sorted((run.folder / "checkpoints").glob("step-*"))


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def newest_state(run: Run) -> dict[str, Any] | None:
    """The state of the newest checkpoint; None before the first."""
    folder = checkpoint.newest(run.folder)
    return None if folder is None else read_state(folder)


# ------------------------------------------------------------------ what a run was made of


def saved_plugin(run: Run, plugin: dict[str, Any]) -> dict[str, Any]:
    """A plug-in section that names the copy in the run folder, where it is a function of a file.

    So a run can be evaluated after the file was changed or moved.
    """
    file, _, function = plugin["name"].rpartition(":")
    saved_as = run_folder.plugin_files(run.cfg).get(Path(file)) if file.endswith(".py") else None
    if saved_as is None:
        return plugin
    copy = run.folder / "plugins" / saved_as
    return plugin | {"name": f"{copy}:{function}"} if copy.is_file() else plugin


def load_policies(cfg: Config, folder: Path, device: torch.device) -> Policies:
    """The model that training started from, and the policy of the checkpoint in `folder`.

    A LoRA adapter is put beside its base, as in training, and not merged into it: so the numbers
    are the same bit for bit. Then both policies share the base.
    """
    dtype = dtype_of(cfg, device)
    task = None
    if cfg.model.name == "tiny":  # the base model was made from the prompts of the task
        task = resolve(cfg.task, TASKS, "task")("train")
    policy, tokenizer = load(model_name(cfg.model.name, task), device=device, dtype=dtype)
    if cfg.lora.r:
        lora.adapt(policy.lm, **asdict(cfg.lora))
        lora.restore(policy.lm, folder)
        return Policies(tokenizer, reference_of(policy), policy.eval())
    trained, _ = load(str(folder), device=device, dtype=dtype)
    return Policies(tokenizer, policy, trained)
