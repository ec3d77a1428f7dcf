"""What only a GPU can measure, one command a stage.

    python -m benchmarks.gpu_day --dry-run                     what there is, and what is missing
    python -m benchmarks.gpu_day logprobs rollouts             these two
    python -m benchmarks.gpu_day all --minutes 30 --out DIR    in the order of their value

Each stage has a file DIR/STAGE.json, which is written again after each of its parts. A part that
ended well is not run again. A part is a process of its own: where the time of a stage is over, it
is killed, and what it has written is kept. Nothing is installed. Packages that a machine lacks can
be carried there in a folder, as --dry-run says: PYTHONPATH=wheels python -m benchmarks.gpu_day …
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_day.stages import PEERS, RUN, STAGES, Part, Stage, missing
from benchmarks.machine import commit_of, where

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 20  # of a stage's time, with which a part is still begun
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
KEPT_OUTPUT = 12_000  # characters
NO_DEVICE = "no CUDA device here: --tiny runs shrunk stages on a CPU"


class Day(NamedTuple):
    """What all parts share."""

    out: Path  # folder of the results
    runs: Path  # folder of training runs, which the next call finds again
    commit: str | None


def run_part(part: Part, seconds: float, day: Day) -> dict[str, Any]:
    """Run a part for at most `seconds`, and return what is to be kept of it.

    "state" is done, failed, cut or interrupted.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        written, log = Path(name) / "out.json", Path(name) / "log"
        arguments = [word.format(out=written, runs=day.runs) for word in part.arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=os.environ | OFFLINE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            state = "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            state = "cut"
        except KeyboardInterrupt:
            state = "interrupted"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what the part itself has started
            process.wait()
        return {
            "state": state,
            "minutes": (time.perf_counter() - start) / 60,
            **machine(),
            "commit": day.commit,
            "command": " ".join(["python", *part.arguments]),
            "result": read(written),
            "output": log.read_text(errors="replace")[-KEPT_OUTPUT:],
        }


def machine() -> dict[str, Any]:
    """Device and versions, also of what only some machines have."""
    libraries = ["transformers"]
    for name in ("triton", *PEERS.values()):
        with suppress(PackageNotFoundError):
            version(name)
            libraries.append(name)
    return where(*libraries)


def read(file: Path) -> Any:
    """The JSON of a file; None where it is not there, or only half of it."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def run_stage(stage: Stage, parts: tuple[Part, ...], seconds: float, day: Day) -> bool:
    """Run the parts that are not done yet, and write the stage's file after each.

    Those that were cut or failed before come last. Returns whether all are done.
    """
    file = day.out / f"{stage.name}.json"
    written = read(file) or {"stage": stage.name, "purpose": stage.purpose, "parts": {}}
    end = time.perf_counter() + seconds
    for part in sorted(parts, key=lambda part: part.name in written["parts"]):
        if is_done(written, part):
            continue
        left = end - time.perf_counter()
        if left < LEAST_SECONDS:
            print(f"{stage.name}: no time left for {part.name}")
            break
        print(f"{stage.name}: {part.name} …", flush=True)
        row = run_part(part, left, day)
        written["parts"][part.name] = row
        write(file, written)
        print(f"{stage.name}: {part.name} {row['state']} after {row['minutes']:.1f} minutes")
        if row["state"] != "done":
            print("\n".join(row["output"].splitlines()[-12:]), flush=True)
        if row["state"] == "interrupted":
            raise KeyboardInterrupt
    return all(is_done(written, part) for part in parts)


def is_done(written: dict[str, Any], part: Part) -> bool:
    return written["parts"].get(part.name, {}).get("state") == "done"


def write(file: Path, content: Any) -> None:
    """Write JSON so that a kill leaves the old file or the new one."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(file)


def overview(tiny: bool, out: Path) -> None:
    """Print each stage: minutes, parts that are done, and packages that are missing."""
    for stage in STAGES:
        parts = stage.tiny if tiny else stage.parts
        written = read(out / f"{stage.name}.json") or {"parts": {}}
        done = sum(is_done(written, part) for part in parts)
        print(
            f"{stage.name:15} at most {stage.minutes:g} minutes, {done} of {len(parts)} parts done"
        )
        print(f"{'':15} {stage.purpose}")
        for title, packages in (("needs", stage.needs), ("without", stage.wants)):
            if missing(packages):
                print(f"{'':15} {title}: {', '.join(missing(packages))}")
    print_how_to_carry([name for stage in STAGES for name in missing(stage.needs)])
    if not torch.cuda.is_available():
        print(NO_DEVICE)


def print_how_to_carry(packages: list[str]) -> None:
    """Print how packages get to a machine without a network."""
    if not packages:
        return
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = (
        "  pip install --target wheels --only-binary=:all: --platform manylinux_2_28_x86_64 "
        f"--platform manylinux2014_x86_64 --python-version {python}"
    )
    names = dict.fromkeys(packages)
    with_requirements = [name for name in names if name in RUN.values()]
    alone = [name for name in names if name not in RUN.values()]  # torch is required by some
    print("where there is a network, for a machine with x86-64 and this Python:")
    if with_requirements:
        print(command, *with_requirements)
    if alone:
        print(command, "--no-deps", *alone)
    print("then: PYTHONPATH=wheels python -m benchmarks.gpu_day …")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"all, or {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=30, help="of all stages together")
    parser.add_argument("--limit", type=float, default=8, help="minutes of a stage")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    runs = Path(tempfile.gettempdir()) / "rlkl-gpu-day"
    parser.add_argument("--runs", type=Path, default=runs, help="folder of the learning stage")
    parser.add_argument("--commit", default=commit_of(ROOT), help="where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="what there is and what is missing")
    parser.add_argument("--tiny", action="store_true", help="shrunk shapes, also on a CPU")
    args = parser.parse_args(argv)
    unknown = set(args.stages) - {"all", *names}
    if unknown or not (args.stages or args.dry_run):
        parser.error(f"name stages: all, or {', '.join(names)}; or --dry-run")
    if "all" in args.stages:
        args.stages = names
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the stages. Returns 0 if all that was asked for is done, else 1."""
    args = parse(argv)
    if args.dry_run:
        overview(args.tiny, args.out)
        return 0
    if not (args.tiny or torch.cuda.is_available()):
        print(NO_DEVICE, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    day = Day(args.out.resolve(), args.runs.resolve(), args.commit)
    end = time.perf_counter() + 60 * args.minutes
    complete = True
    for stage in STAGES:
        if stage.name not in args.stages:
            continue
        if missing(stage.needs):
            print(f"{stage.name}: not run")
            print_how_to_carry(missing(stage.needs))
            complete = False
            continue
        seconds = min(60 * min(stage.minutes, args.limit), end - time.perf_counter())
        parts = stage.tiny if args.tiny else stage.parts
        complete &= run_stage(stage, parts, seconds, day)
    print(f"results: {args.out}")
    return 0 if complete else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill keeps what a Ctrl-C keeps
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
