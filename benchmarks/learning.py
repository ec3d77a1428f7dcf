"""Learning alone, a forward and a backward pass of a batch, against another checkout of rlkl.

    git worktree add ../before 38ec6df
    python -m benchmarks.learning --against ../before

Two packages of one name cannot be in one process, so each is in a process of its own, and the two
take turns. CPU seconds of one thread; a ratio is the median of the ratios of neighbours. Both sides
have the same weights and tokens, and their losses and gradients are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from benchmarks.machine import commit_of, where
from rlkl.run.terminal import console

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("learning_worker.py")
PROMPTS = 2
GROUP = 8
SAME = 1e-3  # relative: float32 sums in another order


class Work(NamedTuple):
    """PROMPTS prompts, and GROUP responses to each."""

    prompt: int  # tokens of the longest prompt
    response: int  # tokens of the longest possible response
    goal: float  # times as fast as commit 38ec6df

    @property
    def name(self) -> str:
        return f"P = {self.prompt}, T = {self.response}"

    def lengths(self) -> dict[str, list]:
        """One prompt of full length and shorter ones; responses of 30 to 100 % of theirs."""
        rng = torch.Generator().manual_seed(self.prompt + self.response)
        shares = (0.5 + 0.5 * torch.rand(PROMPTS - 1, generator=rng)).tolist()
        prompts = [self.prompt, *(int(share * self.prompt) for share in shares)]
        responses = self.response * (0.3 + 0.7 * torch.rand(PROMPTS, GROUP, generator=rng))
        return {"prompts": prompts, "responses": responses.long().tolist()}


WORKS = (Work(128, 128, 1.5), Work(512, 128, 2.5), Work(64, 256, 1.1))


class Worker:
    """A process with the package of one checkout."""

    def __init__(self, checkout: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def learn(self, lengths: dict[str, list]) -> dict[str, float]:
        """What `learn` of the worker returns for a batch of these lengths."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(lengths) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{WORKER.name} ended: its error is above")
        return json.loads(answer)


def measure(work: Work, ours: Worker, other: Worker, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which both have a turn, after one that warms up.

    Raises ValueError where the two do not learn the same.
    """
    lengths = work.lengths()
    pairs = []
    for turn in range(rounds + 1):
        if turn % 2:
            theirs = other.learn(lengths)
            pairs.append((ours.learn(lengths), theirs))
        else:
            pairs.append((ours.learn(lengths), other.learn(lengths)))
        for name in ("loss", "gradient_norm"):
            mine, yours = (side[name] for side in pairs[-1])
            if not math.isclose(mine, yours, rel_tol=SAME):
                raise ValueError(f"{work.name}: {name} is {mine} here and {yours} there")
    seconds = [(mine["seconds"], yours["seconds"]) for mine, yours in pairs[1:]]
    return {
        "seconds": statistics.median(mine for mine, _ in seconds),
        "seconds_before": statistics.median(yours for _, yours in seconds),
        "ratio": statistics.median(yours / mine for mine, yours in seconds),
        "goal": work.goal,
        "rounds": rounds,
    }


def markdown(measured: dict[str, Any]) -> str:
    """The table of docs/results.md."""
    lines = ["| | s | s before | × before | goal |", "|---|---|---|---|---|"]
    for name, row in measured["results"].items():
        seconds = f"{row['seconds']:.2f} | {row['seconds_before']:.2f}"
        lines.append(f"| {name} | {seconds} | {row['ratio']:.2f} | {row['goal']} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and write the results. Returns what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, required=True, help="folder of another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning-cpu.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = Table("", "s", "s before", "× before", "goal", title="forward and backward pass")
    measured: dict[str, Any] = {
        **where("transformers"),
        "clock": "CPU seconds",
        "commit": commit_of(ROOT),
        "against": commit_of(args.against),
        "prompts": PROMPTS,
        "group": GROUP,
        "results": {},
    }
    with ExitStack() as stack:
        ours, other = (stack.enter_context(Worker(folder)) for folder in (ROOT, args.against))
        for work in WORKS:
            row = measure(work, ours, other, args.rounds)
            measured["results"][work.name] = row
            args.out.write_text(json.dumps(measured, indent=1) + "\n")
            times = (f"{row[name]:.2f}" for name in ("seconds", "seconds_before", "ratio", "goal"))
            table.add_row(work.name, *times)
    console.print(table)
    return measured


if __name__ == "__main__":
    main()
