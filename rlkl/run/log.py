"""One row of metrics per step, to metrics.jsonl and to Weights & Biases."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from rlkl.errors import UserError


class RunLog:
    """Appends rows to metrics.jsonl in a run folder, and sends them to W&B where that is on."""

    def __init__(
        self, folder: Path, config: dict, *, wandb_mode: str, project: str, start: int
    ) -> None:
        """Open the log after `start` steps. Later rows are dropped: those steps are run again."""
        wandb = load_wandb(wandb_mode)
        self.path = folder / "metrics.jsonl"
        rows = [row for row in read_rows(self.path) if row["step"] <= start]
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(scratch, self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.wandb = None
        if wandb is not None:
            self.wandb = wandb.init(
                project=project,
                name=folder.name,
                id=wandb_id(folder),
                dir=folder,
                config=config,
                mode=wandb_mode,
                resume="allow",
            )

    def write(self, row: dict, sample: dict | None) -> None:
        """Write the row of a step; the JSONL also gets a sample of the step."""
        self.file.write(json.dumps(row if sample is None else row | {"sample": sample}) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def load_wandb(mode: str) -> Any:
    """The module wandb; None where log.wandb is disabled. UserError where it is not installed."""
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"log.wandb={mode} needs wandb: pip install 'rlkl[wandb]', or set log.wandb=disabled"
        ) from error
    return wandb


def wandb_id(folder: Path) -> str:
    """The id of the run at W&B, kept in the run folder.

    W&B continues a run with a known id. So a resumed run has the id of its folder, and two folders
    of the same name have different ids.
    """
    path = folder / "wandb-id"
    if not path.exists():
        path.write_text(uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, up to a line that a crash has cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
