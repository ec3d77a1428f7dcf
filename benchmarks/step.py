"""Where the time of a step goes: medians over short runs of the tiny configs.

python -m benchmarks.step [--steps N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import tempfile
from pathlib import Path

from rich.table import Table

import train
from benchmarks.machine import where
from rlkl.run import folder as runs
from rlkl.run.log import read_rows
from rlkl.run.terminal import console

CONFIGS = ("configs/tiny-grpo.yaml", "configs/tiny-ppo.yaml")
COLUMNS = (
    "seconds",
    "seconds/rollout",
    "seconds/logprobs",
    "seconds/update",
    "tokens_per_second",
    "peak_memory_gb",
)


def measure(config: str, steps: int) -> dict[str, float]:
    """Medians of the last two thirds of the steps; the first third warms up."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            config,
            f"optim.steps={steps}",
            "eval.every=0",
            "eval.samples=1",
            "eval.prompts=8",
            "checkpoint.every=0",
            f"run={folder}/run",
        ]
        train.train(runs.configure(argv), shlex.join(argv))
        rows = read_rows(Path(folder) / "run" / "metrics.jsonl")[steps // 3 :]
    return {name: statistics.median(row[name] for row in rows) for name in COLUMNS}


def main(argv: list[str] | None = None) -> None:
    """Measure every config, print a table and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    args = parser.parse_args(argv)
    results = {config: measure(config, args.steps) for config in CONFIGS}
    title = f"medians of {args.steps - args.steps // 3} steps"
    table = Table("", *(Path(config).stem for config in results), title=title)
    for name in COLUMNS:
        table.add_row(name, *(f"{row[name]:.3g}" for row in results.values()))
    console.print(table)
    written = {**where("transformers"), "results": results}
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
