"""What the commands share: their configuration, their folder, what they end with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rlkl import config, runs
from rlkl.build import TABLES
from rlkl.log import RunLog
from rlkl.schema_supervised import Supervised
from rlkl.terminal import before_and_after, say, usage

S = TypeVar("S")
TAKEN = "choose another, or delete it"


def configure(argv: list[str], schema: type[S], command: str, doc: str) -> S | None:
    """CONFIG.yaml and a.b=c → the command's options; None once --help has listed them."""
    if {"-h", "--help"} & set(argv):
        usage(doc, config.options(TABLES, schema), f"rlkl {command}")
        return None
    cfg = config.load(argv, schema=schema)
    if (run := getattr(cfg, "run", "auto")) != "auto":
        runs.check_new(Path(run), TAKEN)
    return cfg


def new_run(cfg: Supervised, command: str, argv: list[str]) -> Path:
    """The folder of a run of this command. UserError where it exists."""
    return runs.make_folder(cfg, command, ["rlkl", command, *argv], TAKEN)


def open_log(cfg: Supervised, folder: Path) -> RunLog:
    return RunLog(folder, asdict(cfg), wandb_mode=cfg.log.wandb, project=cfg.log.project, start=0)


def finish(folder: Path, lm: Any, tokenizer: Any, before: dict[str, float], after: dict[str, float], title: str
           ) -> None:
    """Save the model as a Hugging Face directory, and say what was reached."""
    lm.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    before_and_after(before, after, title)
    say(f"model: {folder / 'model'}")
