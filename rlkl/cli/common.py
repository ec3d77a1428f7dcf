"""What rlkl sft, reward-model, dpo and label share: options, run folder, log and last lines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlkl.run import config
from rlkl.run import folder as run_folder
from rlkl.run.help import asks_for_help, every_option, show_help, usage
from rlkl.run.log import RunLog, load_wandb
from rlkl.run.terminal import log_before_after, log_line, note_few_heldout
from rlkl.supervised.schema import SupervisedConfig
from rlkl.supervised.scratch import write

S = TypeVar("S")
ADVICE = "choose another, or delete it"  # where a run's folder exists


def configure(argv: list[str], schema: type[S], command: str, doc: str) -> S | None:
    """The options of a command, from CONFIG.yaml files and `a.b=c`; None where --help was printed.

    Raises UserError on what is known to fail before a model is loaded.
    """
    if asks_for_help(argv):
        show_help(argv, f"{doc}\n{usage(f'rlkl {command}')}", every_option(argv, schema))
        return None
    cfg = config.load(argv, schema=schema)
    if isinstance(cfg, SupervisedConfig):
        if cfg.run != "auto":
            run_folder.check_new(Path(cfg.run), ADVICE)
        load_wandb(cfg.log.wandb)
    return cfg


def new_run(cfg: SupervisedConfig, command: str, argv: list[str]) -> Path:
    """Make the folder of a run of this command. Raises UserError where it exists."""
    return run_folder.make_folder(cfg, command, shlex.join(["rlkl", command, *argv]), ADVICE)


def log_start(
    device: torch.device, folder: Path, train: Sequence[Any], heldout: Sequence[Any], kind: str
) -> None:
    """Print where a run is and how much it learns from; and a note where little is held out.

    kind: "rows" or "pairs".
    """
    log_line(f"device: {device}   run: {folder}   {len(train)} {kind}, {len(heldout)} held out")
    note_few_heldout(len(heldout), kind, "give more, or hold out a larger share")


def open_log(cfg: SupervisedConfig, folder: Path) -> RunLog:
    """The log of a new run, to be closed."""
    return RunLog(folder, asdict(cfg), wandb_mode=cfg.log.wandb, project=cfg.log.project, start=0)


def finish(
    folder: Path,
    lm: Any,
    tokenizer: Any,
    before: dict[str, float],
    after: dict[str, float],
    title: str,
) -> None:
    """Save the model in folder/model, and print the held-out metrics before and after."""
    model_folder = write(folder / "model", lm, tokenizer)
    log_before_after(before, after, title)
    log_line(f"model: {model_folder}")
