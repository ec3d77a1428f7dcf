"""`make learn`: PPO and GRPO on the tiny model from 3 seeds, and controls with shuffled advantages.

    python tests/learn.py [CONFIG.yaml ...] [key=value ...]

The exit code is 1 if a run ends below 0.95 held-out accuracy, or if a control gains 0.1. Without
arguments the rows are written to benchmarks/results/learn.json.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rlkl.run import config  # noqa: E402

CONFIGS = ("configs/tiny-grpo.yaml", "configs/tiny-ppo.yaml")
SEEDS = (0, 1, 2)
GOAL = 0.95  # accuracy that every run reaches
GAIN = 0.1  # in accuracy, which no control reaches
RESULTS = ROOT / "benchmarks" / "results" / "learn.json"


def control_of(path: str, overrides: list[str]) -> list[str]:
    """The options of the same configuration with shuffled advantages.

    Another name resets the options of a section, so they are given again.
    """
    advantage = config.load([path, *overrides]).advantage
    name = advantage.pop("name")
    return [
        f"advantage.name=tests/shuffled.py:{name}",
        *(f"advantage.{k}={json.dumps(v)}" for k, v in advantage.items()),
    ]


def run(path: str, seed: int, control: bool, overrides: list[str], folder: Path) -> dict:
    """One run in a process of its own. Its numbers before and after are read from its report."""
    argv = [path, *overrides, f"seed={seed}", f"run={folder}"]
    if control:
        argv += control_of(path, overrides)
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "train.py", *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise SystemExit(f"train.py {' '.join(argv)}\n{process.stderr.strip()}")
    minutes = (time.monotonic() - started) / 60
    row = {"config": path, "seed": seed, "control": control, "minutes": round(minutes, 2)}
    return row | before_and_after((folder / "report.md").read_text())


def before_and_after(report: str) -> dict[str, tuple[float, float]]:
    """Accuracy, greedy accuracy and pass@k before and after training."""
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \|$", report, re.MULTILINE)
    return {
        name: (float(before), float(after))
        for name, before, after in rows
        if name in ("accuracy", "greedy") or name.startswith("pass@")
    }


def passed(row: dict) -> bool:
    before, after = row["accuracy"]
    return after - before < GAIN if row["control"] else after >= GOAL


def verdict(row: dict) -> str:
    if passed(row):
        return "ok"
    return f"gains ≥ {GAIN}" if row["control"] else f"below {GOAL}"


def table(rows: list[dict]) -> Table:
    names = [name for name in rows[0] if isinstance(rows[0][name], tuple)]
    columns = ["config", "seed", *names, "minutes", ""]
    result = Table(*columns, title="held out, before → after", title_justify="left")
    for row in rows:
        name = Path(row["config"]).stem + (", shuffled advantages" if row["control"] else "")
        numbers = ["{:.3f} → {:.3f}".format(*row[n]) for n in names]
        result.add_row(name, str(row["seed"]), *numbers, f"{row['minutes']:.1f}", verdict(row))
    return result


def device() -> str:
    """The processor's name; runs are on the CPU unless a configuration says otherwise."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, 2 threads"


def main(argv: list[str]) -> int:
    overrides = [arg for arg in argv if "=" in arg]
    configs = [arg for arg in argv if "=" not in arg] or CONFIGS
    plan = [(path, seed, False) for path in configs for seed in SEEDS]
    plan += [(path, 0, True) for path in configs]
    rows = []
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(plan))
        for number, (path, seed, control) in enumerate(plan):
            title = f"{path} seed={seed}{' shuffled' if control else ''}"
            bar.update(task, description=title)
            rows.append(run(path, seed, control, overrides, Path(scratch) / str(number)))
            before, after = rows[-1]["accuracy"]
            console.print(f"{title}: {before:.3f} → {after:.3f}")
            bar.advance(task)
    console.print(table(rows))
    if not argv:
        write_results(rows)
        console.print(f"written to {RESULTS.relative_to(ROOT)}")
    return 0 if all(map(passed, rows)) else 1


def write_results(rows: list[dict]) -> None:
    versions = {name: version(name) for name in ("torch", "transformers")}
    versions["python"] = platform.python_version()
    results = {"device": device(), **versions, "rows": rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
