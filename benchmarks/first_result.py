"""`make first-result`: what GRPO and PPO learn from ten base models on three kinds of CPU.

    python -m benchmarks.first_result [--processes 2] [--only PATTERN]

A base model is made from a seed, and with the vector instructions of an older or a newer CPU, which
round differently (ATEN_CPU_CAPABILITY). Every base is trained by GRPO and half of them by PPO. For
the controls the advantages are shuffled between the responses. Each run is a row of
benchmarks/results/first-result.json, which is written when the run is done; a row that is there is
not run again. The table of the README is filled from the rows.

The exit code is 1 if a run ends below GOAL held-out accuracy, or if a control gains GAIN.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.examples import ROOT, execute, reason, shown
from benchmarks.machine import processor
from benchmarks.pages import fill, table
from benchmarks.parallel import as_they_end
from rlkl.run import config
from rlkl.run import folder as runs
from rlkl.run.terminal import console
from rlkl.supervised.tiny import cached_base
from rlkl.tasks import Addition

RESULTS = ROOT / "benchmarks" / "results" / "first-result.json"
README = ROOT / "README.md"
CACHE = ROOT / "runs" / "first-result"  # of the base models, a folder per capability
CAPABILITIES = ("default", "avx2", "avx512")
SEEDS = range(10)  # of the base and of the run
PPO_SEEDS = range(5)
CONTROL_SEEDS = range(1)
GOAL = 0.98  # accuracy that every run reaches
GAIN = 0.1  # in accuracy, which no control reaches
METRICS = {"accuracy": "sampled", "greedy": "greedy", "pass@8": "pass@8"}  # and their titles


class Run(NamedTuple):
    """What is run: a configuration, from a base model."""

    config: str
    seed: int
    capability: str
    control: bool = False

    @property
    def name(self) -> str:
        """For `--only` and the terminal."""
        control = " control" if self.control else ""
        return f"{self.config} seed={self.seed} {self.capability}{control}"


class Row(NamedTuple):
    """One run, as it stands in the file of results."""

    config: str
    seed: int
    capability: str
    control: bool
    found: dict[str, list[float]]  # {name: [base, trained]}, held out
    seconds: float  # of CPU time
    base_seconds: float  # of CPU time; only a moment where the base was in the cache
    git: str  # the revision that was run

    @property
    def run(self) -> Run:
        return Run(self.config, self.seed, self.capability, self.control)


def plan() -> list[Run]:
    """All runs. Those of one base are far apart, so that no two processes make the same base."""
    seeds = {"tiny-grpo": SEEDS, "tiny-ppo": PPO_SEEDS}
    real = [Run(name, s, c) for name in seeds for s in seeds[name] for c in CAPABILITIES]
    controls = [
        Run(name, s, c, control=True) for name in seeds for s in CONTROL_SEEDS for c in CAPABILITIES
    ]
    return real + controls


# ------------------------------------------------------------------ one run


def measure(run: Run) -> Row:
    """Make the base if it is missing, and train it, each in a process of its own.

    SystemExit with the last line of a process that fails.
    """
    env = {"ATEN_CPU_CAPABILITY": run.capability, "RLKL_CACHE": str(CACHE / run.capability)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, base_seconds = succeed(
            ["-m", "benchmarks.first_result", "--base", str(run.seed)], folder, env
        )
        argv = [f"model.name={base.split()[-1]}", f"seed={run.seed}", "run=run"]
        path = str(ROOT / "configs" / f"{run.config}.yaml")
        if run.control:
            argv += shuffled_advantages(path)
        output, seconds = succeed([str(ROOT / "train.py"), path, *argv], folder, env)
    found = {name: numbers for name, numbers in shown(output).items() if name in METRICS}
    revision = runs.git("rev-parse", "HEAD") or ""
    return Row(*run, found, round(seconds, 1), round(base_seconds, 1), revision)


def succeed(argv: list[str], folder: Path, env: dict[str, str]) -> tuple[str, float]:
    """Run Python with these arguments. Returns what it printed, and its CPU seconds."""
    done, seconds = execute([sys.executable, *argv], folder, env)
    if done.returncode:
        sys.exit(f"error: {' '.join(argv)}: {reason(done)}")
    return done.stdout, seconds


def shuffled_advantages(path: str) -> list[str]:
    """The options of a control: the same estimator, with its advantages shuffled.

    Another name resets the options of a section, so they are given again.
    """
    advantage = config.load([path]).advantage
    name = advantage.pop("name")
    options = [f"advantage.{key}={json.dumps(value)}" for key, value in advantage.items()]
    return [f"advantage.name={ROOT / 'tests' / 'shuffled.py'}:{name}", *options]


def make_base(seed: int) -> Path:
    """The folder of the base model of this seed, made on this process's kind of CPU.

    SystemExit where the CPU has not the capability that it should have.
    """
    capability = torch.backends.cpu.get_cpu_capability().lower()
    wanted = os.environ.get("ATEN_CPU_CAPABILITY", capability)
    if capability != wanted:
        sys.exit(f"error: this CPU has {capability} and not {wanted}: leave it out with --only")
    task = Addition("train")
    return cached_base(lambda step, steps: None, [task[i] for i in range(len(task))], seed)


# ------------------------------------------------------------------ the table


def passed(row: Row) -> bool:
    """Does a run reach GOAL, or a control gain less than GAIN?"""
    before, after = row.found["accuracy"]
    return after - before < GAIN if row.control else after >= GOAL


def results_table(rows: Sequence[Row]) -> str:
    """One line for each configuration and its controls: from the worst run to the best."""
    lines = []
    for run in dict.fromkeys((row.config, row.control) for row in rows):
        same = [row for row in rows if (row.config, row.control) == run]
        name, control = run
        title = f"`configs/{name}.yaml`" + (", advantages shuffled" if control else "")
        numbers = [change([row.found[metric] for row in same]) for metric in METRICS]
        seconds = statistics.median(row.seconds for row in same)
        lines.append([title, str(len(same)), *numbers, f"{seconds:.0f} s"])
    return table(["", "runs", *METRICS.values(), "CPU time"], lines)


def change(pairs: Sequence[Sequence[float]]) -> str:
    """The lowest and the highest number before training, and those after it."""
    before, after = zip(*pairs, strict=True)
    return f"{span(before)} → {span(after)}"


def span(numbers: Sequence[float]) -> str:
    """`0.994–0.998`, the lowest and the highest, or the only one."""
    ends = dict.fromkeys((f"{min(numbers):.3f}", f"{max(numbers):.3f}"))
    return "–".join(ends)


# ------------------------------------------------------------------ the file of results


def read() -> tuple[dict, list[Row]]:
    """Where the results were measured, and the rows."""
    if not RESULTS.exists():
        return {}, []
    tree = json.loads(RESULTS.read_text(encoding="utf-8"))
    return tree["where"], [Row(**row) for row in tree["rows"]]


def write(where: dict, rows: Sequence[Row]) -> None:
    """Replace the file of results, at once. The rows are in the order of the plan."""
    order = {run: number for number, run in enumerate(plan())}
    tree = {"where": where, "rows": [r._asdict() for r in sorted(rows, key=lambda r: order[r.run])]}
    unfinished = RESULTS.with_suffix(".tmp")
    unfinished.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(RESULTS)


def results(missing: Sequence[Run], processes: int) -> Iterator[Row]:
    """The rows of these runs, in the order in which they end. One process is this one."""
    if processes == 1:
        yield from map(measure, missing)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from as_they_end(pool, measure, missing)


def measure_all(only: str, processes: int) -> list[Row]:
    """Run what is missing of the runs that match the pattern. Returns all rows of the file."""
    where = runs.provenance("make first-result") | {"device": processor(), "threads": 1}
    rows = read()[1]
    done = {row.run for row in rows}
    missing = [run for run in plan() if run not in done and re.search(only, run.name)]
    console.print(f"{RESULTS.name}: {len(missing)} to run, {len(done)} are there")
    for number, row in enumerate(results(missing, processes), 1):
        rows.append(row)
        write(where, rows)
        before, after = row.found["accuracy"]
        console.print(
            f"{number:3d} of {len(missing)}  {row.run.name}: {before:.3f} → {after:.3f}, "
            f"{row.seconds:.0f} s, base {row.base_seconds:.0f} s"
        )
    return read()[1]


def main(argv: list[str] | None = None) -> int:
    """Run what is missing and print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression")
    parser.add_argument("--base", metavar="SEED", type=int, help="only make this base model")
    args = parser.parse_args(argv)
    if args.base is not None:
        print(make_base(args.base))
        return 0
    rows = measure_all(args.only, args.processes)
    if not rows:
        return 1
    console.print(results_table(rows), soft_wrap=True)
    failed = [row for row in rows if not passed(row)]
    for row in failed:
        console.print(f"failed: {row.run.name}: {row.found['accuracy'][1]:.3f}")
    if len(rows) == len(plan()):
        fill([README], {"first-result": results_table(rows)})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
