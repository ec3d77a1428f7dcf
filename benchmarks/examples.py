"""`make examples`: every configuration for a CPU, end to end, each as its first line says it is run; one table.

    python -m benchmarks.examples [PATTERN]     whose name contains it; the tiny-rlhf pipeline needs all its parts

Seconds are CPU time of one thread: other programs' does not count, but they slow it by up to a half where cores and
caches are shared. Exit code 1 if a run fails, does not improve by what is stated here, or takes more than two minutes.
Some are shortened: `overrides`.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
LIMIT = 120.0  # seconds


class Example(NamedTuple):
    """A configuration, what is looked at before and after, and by how much it must have changed at least."""

    config: str
    shown: str
    change: float  # negative: it must fall
    overrides: tuple[str, ...] = ()


EASY = ("task.problems=4000", "task.numbers=[2, 2]", "task.heldout=0.1")
SMALL = (*EASY, "scratch.layers=4", "scratch.hidden=128", "scratch.heads=2", "optim.epochs=5", "optim.batch=128",
         "optim.lr=1.5e-3")
SMALL_RL = (*EASY, "sampling.prompts=64", "sampling.max_new_tokens=8", "optim.steps=40", "optim.lr=3e-4",
            "optim.minibatch=128", "eval.prompts=300", "eval.samples=4")
EXAMPLES = (
    Example("tiny-grpo", "accuracy", 0.3, ("optim.steps=50", "eval.prompts=200")),
    Example("tiny-ppo", "accuracy", 0.2, ("optim.steps=100",)),
    Example("tiny-dapo", "accuracy", 0.2, ("optim.steps=100",)),
    Example("tiny-rloo", "accuracy", 0.2, ("optim.steps=70",)),
    Example("tiny-lora", "accuracy", 0.1, ("optim.steps=60",)),
    Example("tiny-countdown", "accuracy", 0.2, ("optim.steps=60",)),
    Example("tiny-gym", "accuracy", 0.1, ("optim.steps=30", "optim.lr=6e-4", "eval.prompts=200")),
    Example("scratch-sft", "loss", -1.0, SMALL),
    Example("scratch-countdown", "accuracy", 0.05, SMALL_RL),
    Example("tiny-sft", "loss", -1.0),
    Example("tiny-label", "pairs", 1000),
    Example("tiny-reward-model", "accuracy", 0.2),
    Example("tiny-rlhf-ppo", "accuracy", 0.15),
    Example("tiny-rlhf-grpo", "accuracy", 0.15),
    Example("tiny-dpo", "accuracy", 0.2),
)


class Result(NamedTuple):
    seconds: float
    before: float
    after: float
    failed: str  # why; empty if it did not


def command(example: Example) -> list[str]:
    """`# rlkl NAME: …` in a configuration's first line names the command that reads it; the others are train.py's."""
    path = ROOT / "configs" / f"{example.config}.yaml"
    named = re.match(r"# rlkl ([\w-]+):", path.read_text(encoding="utf-8"))
    program = ["-m", "rlkl", named[1]] if named else [str(ROOT / "train.py")]
    return [sys.executable, *program, str(path), *example.overrides]


def shown(said: str) -> dict[str, list[float]]:
    """{name: [before, after]} of the table that a run prints last."""
    rows = re.findall(r"^│ (\S+) +│ +(-?[\d.]+) +│ +(-?[\d.]+) +│$", said, re.MULTILINE)
    return {name: [float(before), float(after)] for name, before, after in rows}


def measured(said: str, name: str) -> list[float] | None:
    """Before and after; from nothing to a number, where that is all that is said."""
    number = re.search(rf"(\d+) {name}", said)
    return shown(said).get(name) or ([0.0, float(number[1])] if number else None)


def start(example: Example, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """One run in a process of its own, in a folder that the runs of the pipeline share; and its CPU seconds."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command(example), cwd=folder, env=env, capture_output=True, text=True, check=False)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime


def run(example: Example, folder: Path) -> Result:
    done, seconds = start(example, folder)
    found = measured(done.stdout, example.shown)
    if done.returncode or found is None:
        return Result(seconds, float("nan"), float("nan"), reason(done))
    return Result(seconds, *found, verdict(example, seconds, *found))


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of a run that failed."""
    return (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def verdict(example: Example, seconds: float, before: float, after: float) -> str:
    """Why a run that ended well is no good example; empty if it is one."""
    if not (after - before) * example.change >= example.change**2:  # NaN is no change
        return f"changes by less than {example.change:g}"
    return f"more than {LIMIT:.0f} s" if seconds > LIMIT else ""


def main(argv: list[str]) -> int:
    chosen = [e for e in EXAMPLES if all(pattern in e.config for pattern in argv)]
    console, table = Console(width=120), Table("config", "seconds", "", "before", "after", "")
    failed = 0
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        for example in chosen:
            status.update(" ".join([example.config, *example.overrides]))
            result = run(example, Path(folder))
            failed += bool(result.failed)
            name = example.config + " *" * bool(example.overrides)
            table.add_row(name, f"{result.seconds:.0f}", example.shown, f"{result.before:.3f}", f"{result.after:.3f}",
                          result.failed or "OK")
    console.print(table)
    for example in filter(lambda e: e.overrides, chosen):
        console.print(f"* {example.config} {' '.join(example.overrides)}", soft_wrap=True)
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
