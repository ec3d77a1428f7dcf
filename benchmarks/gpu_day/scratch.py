"""A learning run without a download: scratch-sft, then scratch-countdown for a few steps.

The model that SFT trained is kept in `--folder`, so that a second call does not train it again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import train
from benchmarks.machine import where
from rlkl.cli import sft
from rlkl.run import folder as runs
from rlkl.run.log import read_rows

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_TASK = ("task.problems=200", "task.heldout=0.1")
TINY_SFT = (
    *TINY_TASK,
    "scratch.layers=1",
    "scratch.hidden=16",
    "scratch.heads=2",
    "optim.epochs=1",
)
TINY_COUNTDOWN = (
    *TINY_TASK,
    "sampling.prompts=4",
    "sampling.group_size=2",
    "sampling.max_new_tokens=4",
    "optim.minibatch=null",
    "eval.prompts=4",
    "eval.samples=1",
)


def teach(folder: Path, tiny: bool) -> list[dict[str, Any]]:
    """Train a fresh model by SFT, if it is not there yet. Returns the metrics of each update."""
    run = folder / "sft"
    if not (run / "model").exists():
        shutil.rmtree(run, ignore_errors=True)
        sft.main([f"{CONFIGS}/scratch-sft.yaml", f"run={run}", *(TINY_SFT if tiny else ())])
    return read_rows(run / "metrics.jsonl")


def reinforce(folder: Path, steps: int, tiny: bool) -> dict[str, Any]:
    """GRPO from that model: held-out metrics before and after, and those of each step."""
    run = folder / "countdown"
    shutil.rmtree(run, ignore_errors=True)
    argv = [
        f"{CONFIGS}/scratch-countdown.yaml",
        f"model.name={folder}/sft/model",
        f"run={run}",
        f"optim.steps={steps}",
        "optim.warmup=3",
        "eval.every=0",
        "checkpoint.every=0",
        *(TINY_COUNTDOWN if tiny else ()),
    ]
    session = train.train(runs.configure(argv), "benchmarks.gpu_day.scratch")
    return {"before": session.before, "after": session.after, "steps": session.rows}


def main() -> None:
    """Run both, and write the results after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the two runs")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few problems")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    measured: dict[str, Any] = where("transformers")
    start = time.perf_counter()
    updates = teach(args.folder, args.tiny)
    measured["sft"] = {"seconds": time.perf_counter() - start, "first": updates[0]}
    measured["sft"] |= {"last": updates[-1], "updates": len(updates)}
    args.out.write_text(json.dumps(measured, indent=1) + "\n")
    measured["countdown"] = reinforce(args.folder, args.steps, args.tiny)
    args.out.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
