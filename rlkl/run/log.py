"""Metrics and responses of the steps, to JSONL files in the run folder and to Weights & Biases."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from rlkl.errors import UserError

TABLE_ROWS = 64  # of a table in W&B: those of a step's first prompts, as responses may be long


class RunLog:
    """Appends rows to metrics.jsonl in a run folder, and sends them to W&B where that is on."""

    def __init__(
        self, folder: Path, config: dict, *, wandb_mode: str, project: str, start: int
    ) -> None:
        """Open the log after `start` steps. Later rows are dropped: those steps are run again."""
        self.path = folder / "metrics.jsonl"
        self.responses_path = folder / "responses.jsonl"
        for path in (self.path, self.responses_path):
            drop_later_rows(path, start)
        self.file = self.path.open("a", encoding="utf-8")
        self.wandb = load_wandb(wandb_mode)
        self.wandb_run = None
        if self.wandb is not None:
            self.wandb_run = self.wandb.init(
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
        if self.wandb_run:
            self.wandb_run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def write_responses(self, step: int, responses: list[dict]) -> None:
        """Append the responses of a step to responses.jsonl, one a line."""
        lines = [json.dumps({"step": step, **response}) + "\n" for response in responses]
        with self.responses_path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def send_responses(self, step: int, responses: list[dict]) -> None:
        """Send a table of prompts, responses and scores to W&B, with the metrics of the step."""
        if self.wandb_run:
            table = self.wandb.Table(columns=["step", "prompt", "response", "score"])
            for row in responses[:TABLE_ROWS]:
                prompt = row["prompt"]
                text = prompt if isinstance(prompt, str) else json.dumps(prompt)  # chat messages
                table.add_data(step, text, row["response"], row["score"])
            self.wandb_run.log({"responses": table}, step=step)

    def close(self) -> None:
        self.file.close()
        if self.wandb_run:
            self.wandb_run.finish()


def drop_later_rows(path: Path, step: int) -> None:
    """Remove the rows of steps after `step` from a JSONL file, and a line that a crash cut off.

    The file is replaced as a whole, so that a crash leaves the old one or the new one.
    """
    if not path.exists():
        return
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        for row in rows_of(path):
            if row["step"] <= step:
                file.write(json.dumps(row) + "\n")
    os.replace(scratch, path)


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
    """The rows of a metrics.jsonl, up to a line that a crash has cut off; none without the file."""
    return list(rows_of(path)) if path.exists() else []


def rows_of(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file one by one, up to a line that a crash has cut off."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                return
            yield row
