"""`make crash`: a run killed with kill -9 at 20 random moments equals an uninterrupted one.

It is resumed after each kill. The moments are spread over the whole run: while Python starts,
inside a step, while a checkpoint is written. The exit code is 1 if one bit differs, except in
clocks and memory.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from runs_fixture import PPO, ROOT, arguments, differences, furnish, make_base, rows

STEPS, KILLS, SEED = 25, 20, 1
LIMIT = 120.0  # seconds without a new step: something hangs


def start(folder: Path, base: Path) -> subprocess.Popen:
    """A new run into `folder`, or the one there resumed, if its config was written."""
    if (folder / "config.yaml").exists():
        argv = [f"resume={folder.name}"]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        options = (
            f"optim.steps={STEPS}",
            "checkpoint.every=2",
            "eval.every=5",
            "log.responses_every=1",
            "sampling.prompts=16",
        )
        argv = arguments(base, *PPO, *options, f"run={folder.name}")
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    return subprocess.Popen(
        command,
        cwd=folder.parent,
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".step-*"))


def saved(folder: Path) -> int:
    """The step of the newest complete checkpoint."""
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def last_written(folder: Path) -> int:
    """When the metrics were written, in nanoseconds."""
    metrics = folder / "metrics.jsonl"
    return metrics.stat().st_mtime_ns if metrics.exists() else 0


def kill_somewhere(
    process: subprocess.Popen,
    folder: Path,
    after: int,
    start_seconds: float,
    step_seconds: float,
    rng: random.Random,
) -> str:
    """kill -9 at a random moment, if possible after step `after`.

    Returns what it hit: the start, a step, a checkpoint, or (too late) the end.
    """
    kind = rng.choices(("start", "step", "checkpoint"), (0.2, 0.4, 0.4))[0]
    begun, old = time.monotonic(), last_written(folder)
    after = max(after, saved(folder))
    moment = begun + rng.uniform(0, start_seconds)
    while process.poll() is None:
        now = time.monotonic()
        if kind == "start" and now >= moment:
            break
        resumed = last_written(folder) != old and steps(folder) > after
        if resumed and kind == "step":
            time.sleep(rng.uniform(0, step_seconds))
            break
        if resumed and kind == "checkpoint" and saving(folder):
            time.sleep(rng.uniform(0, 0.02))  # somewhere in it
            break
        if now - begun > LIMIT:
            process.kill()
            raise SystemExit(f"no step in {LIMIT:.0f} s")
        time.sleep(0.001)
    if process.poll() is not None:
        finish(process)
        return "end"
    hit = "checkpoint" if saving(folder) else kind
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return hit


def finish(process: subprocess.Popen) -> None:
    """Wait for a run to end. SystemExit if it failed."""
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run failed with code {process.returncode}:\n{stderr}")


def main() -> int:
    rng, started = random.Random(SEED), time.monotonic()
    hits: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        furnish(here)
        base = make_base(here / "base")
        whole, killed = here / "whole", here / "killed"
        begun, process = time.monotonic(), start(whole, base)
        while steps(whole) < 1 and process.poll() is None:
            time.sleep(0.01)
        start_seconds = time.monotonic() - begun
        finish(process)
        step_seconds = sum(row["seconds"] for row in rows(whole)) / STEPS
        for kill in range(KILLS):
            process, after = start(killed, base), STEPS * kill // (KILLS + 1)
            hits[kill_somewhere(process, killed, after, start_seconds, step_seconds, rng)] += 1
        finish(start(killed, base))
        different = differences(whole, killed)
        numbers = [row["step"] for row in rows(killed)]
    if numbers != list(range(1, STEPS + 1)):
        different.insert(0, f"metrics.jsonl has the steps {numbers}")
    for line in different[:20]:
        print(line)
    where = ", ".join(f"{count} at a {name}" for name, count in sorted(hits.items()))
    result = f"{len(different)} differences" if different else "no bit differs"
    print(f"{KILLS} kills ({where}), {STEPS} steps: {result}; {time.monotonic() - started:.0f} s")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
