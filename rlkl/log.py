"""One row per step, to JSONL and to Weights & Biases; and the meters that fill it."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor


class Meters:
    """Means over every token a step saw, however it was cut: Σ x / Σ 1. A name ending in _max keeps the maximum."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, mask: Tensor, stats: dict[str, Tensor]) -> None:
        """stats: (B, T) per-token numbers."""
        for name, x in stats.items():
            inside, peak = x.detach()[mask], name.endswith("_max")
            if len(inside):
                before = self.sums.get(name, inside[0] if peak else 0)
                self.sums[name] = torch.maximum(before, inside.max()) if peak else before + inside.sum()
                self.counts[name] = 1 if peak else self.counts[name] + len(inside)

    def row(self) -> dict[str, float]:
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}


class RunLog:
    """metrics.jsonl in the run folder, and W&B unless it is disabled."""

    def __init__(self, folder: Path, config: dict, *, wandb_mode: str, project: str, start: int) -> None:
        self.path = folder / "metrics.jsonl"
        rows = [row for row in read_rows(self.path) if row["step"] <= start]  # what comes after it is run again
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(scratch, self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.wandb = None
        if wandb_mode != "disabled":
            import wandb

            mine = folder / "wandb-id"  # W&B goes on with a run of the same id: on resume this one, and never another
            if not mine.exists():
                mine.write_text(uuid4().hex[:8], encoding="utf-8")
            self.wandb = wandb.init(project=project, name=folder.name, id=mine.read_text(encoding="utf-8"), dir=folder,
                config=config, mode=wandb_mode, resume="allow")

    def write(self, row: dict, sample: dict | None) -> None:
        """One row; a sample of the step goes with it into the JSONL."""
        self.file.write(json.dumps(row if sample is None else row | {"sample": sample}) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
