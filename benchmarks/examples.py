"""`make examples`: run every configuration for a CPU, and print one table.

    python -m benchmarks.examples [PATTERN]     those whose name contains PATTERN

Each configuration is run by the command that its first line names. The parts of the tiny-rlhf
pipeline need those before them. Some runs are shortened by overrides, which are printed. Seconds
are CPU time of one thread: other programs do not count, but they may slow a run by up to a half
where they share cores and caches.

The exit code is 1 if a run fails, takes more than two minutes, or improves by less than EXAMPLES
says.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
LIMIT = 120.0  # seconds


class Example(NamedTuple):
    """A configuration, the number to look at before and after, and its least change."""

    config: str
    shown: str
    change: float  # negative: it must fall
    overrides: tuple[str, ...] = ()


EASY = ("task.problems=4000", "task.numbers=[2, 2]", "task.heldout=0.1")
SMALL = (
    *EASY,
    "scratch.layers=4",
    "scratch.hidden=128",
    "scratch.heads=2",
    "optim.epochs=5",
    "optim.batch=128",
    "optim.lr=1.5e-3",
)
SMALL_RL = (
    *EASY,
    "sampling.prompts=64",
    "sampling.max_new_tokens=8",
    "optim.steps=40",
    "optim.lr=3e-4",
    "optim.minibatch=128",
    "eval.prompts=300",
    "eval.samples=4",
)
EXAMPLES = (
    Example("tiny-grpo", "accuracy", 0.3, ("optim.steps=50", "eval.prompts=200")),
    Example("tiny-ppo", "accuracy", 0.3, ("optim.steps=60",)),
    Example("tiny-dapo", "accuracy", 0.3, ("optim.steps=50",)),
    Example("tiny-rloo", "accuracy", 0.2, ("optim.steps=70",)),
    Example("tiny-lora", "accuracy", 0.1, ("optim.steps=60",)),
    Example("tiny-countdown", "accuracy", 0.2, ("optim.steps=60",)),
    Example("tiny-gym", "accuracy", 0.2, ("optim.steps=25", "eval.prompts=200")),
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
    """How a run went."""

    seconds: float
    before: float
    after: float
    failed: str  # why; empty if it did not


def command(example: Example) -> list[str]:
    """The command of a run: `rlkl NAME` where the first line is `# rlkl NAME: …`, else train.py."""
    path = ROOT / "configs" / f"{example.config}.yaml"
    named = re.match(r"# rlkl ([\w-]+):", path.read_text(encoding="utf-8"))
    program = ["-m", "rlkl", named[1]] if named else [str(ROOT / "train.py")]
    return [sys.executable, *program, str(path), *example.overrides]


def shown(output: str) -> dict[str, list[float]]:
    """{name: [before, after]} of the table that a run prints last."""
    rows = re.findall(r"^│ (\S+) +│ +(-?[\d.]+) +│ +(-?[\d.]+) +│$", output, re.MULTILINE)
    return {name: [float(before), float(after)] for name, before, after in rows}


def measured(output: str, name: str) -> list[float] | None:
    """[before, after] of a number in a run's output; before is 0 where only one is printed."""
    table = shown(output)
    if name in table:
        return table[name]
    number = re.search(rf"(\d+) {name}", output)
    return [0.0, float(number[1])] if number else None


def start(example: Example, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run one example in a process of its own. Returns the finished process and its CPU seconds.

    folder: the working directory, which the runs of a pipeline share.
    """
    return execute(command(example), folder)


def execute(
    command: list[str], folder: Path, env: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command on one thread, without network. Returns the process and its CPU seconds.

    env: variables to set beside those of this process.
    """
    defaults = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | defaults | dict(env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done, seconds


def run(example: Example, folder: Path) -> Result:
    """Run one example and judge it."""
    done, seconds = start(example, folder)
    numbers = measured(done.stdout, example.shown)
    if done.returncode or numbers is None:
        return Result(seconds, float("nan"), float("nan"), reason(done))
    before, after = numbers
    return Result(seconds, before, after, verdict(example, seconds, before, after))


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of a run that failed."""
    return (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]


def verdict(example: Example, seconds: float, before: float, after: float) -> str:
    """Why a run that ended well still fails as an example; empty if it does not."""
    improved = (after - before) * example.change >= example.change**2
    if not improved:  # NaN is no improvement
        return f"changes by less than {example.change:g}"
    return f"more than {LIMIT:.0f} s" if seconds > LIMIT else ""


def main(argv: list[str]) -> int:
    """Run the examples whose name contains every pattern. Returns the exit code."""
    examples = [e for e in EXAMPLES if all(pattern in e.config for pattern in argv)]
    console = Console(width=120)
    table = Table("config", "seconds", "", "before", "after", "")
    failed = 0
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        for example in examples:
            status.update(" ".join([example.config, *example.overrides]))
            result = run(example, Path(folder))
            failed += bool(result.failed)
            table.add_row(
                example.config + " *" * bool(example.overrides),
                f"{result.seconds:.0f}",
                example.shown,
                f"{result.before:.3f}",
                f"{result.after:.3f}",
                result.failed or "OK",
            )
    console.print(table)
    for example in examples:
        if example.overrides:
            console.print(f"* {example.config} {' '.join(example.overrides)}", soft_wrap=True)
    return 1 if failed or not examples else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
