"""Where the time of a step goes, python -m benchmarks.step: medians over short runs of the tiny configs."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from rich.table import Table

import train
from benchmarks.machine import where
from rlkl import runs
from rlkl.log import read_rows
from rlkl.terminal import console

CONFIGS = ("configs/tiny-grpo.yaml", "configs/tiny-ppo.yaml")
COLUMNS = ("seconds", "seconds_act", "seconds_evaluate", "seconds_learn", "tokens_per_second", "peak_memory_gb")
STEPS = 30


def measure(config: str) -> dict[str, float]:
    """Medians of the last two thirds of the steps: the first ones warm up."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [config, f"optim.steps={STEPS}", "eval.every=0", "eval.samples=1", "eval.prompts=8",
                "checkpoint.every=0"]
        train.train(runs.configure([*argv, f"run={folder}/run"]), argv)
        rows = read_rows(Path(folder) / "run" / "metrics.jsonl")[STEPS // 3 :]
    return {name: statistics.median(row[name] for row in rows) for name in COLUMNS}


def main() -> None:
    results = {config: measure(config) for config in CONFIGS}
    table = Table("", *(Path(config).stem for config in results), title=f"medians of {STEPS - STEPS // 3} steps")
    for name in COLUMNS:
        table.add_row(name, *(f"{row[name]:.3g}" for row in results.values()))
    console.print(table)
    found = {**where("transformers"), "results": results}
    Path("benchmarks/results/step.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
