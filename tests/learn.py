"""`make learn`: PPO and GRPO on the tiny model from 3 seeds, and a control each whose advantages are shuffled.

    python tests/learn.py [CONFIG.yaml ...] [key=value ...]

Exit code 1 if a run ends below 0.95 held-out accuracy, or if a control gains 0.1. Without arguments the rows are
written to benchmarks/results/learn.json.
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

from rlkl import config  # noqa: E402

CONFIGS = ("configs/tiny-grpo.yaml", "configs/tiny-ppo.yaml")
SEEDS = (0, 1, 2)
GOAL, GAIN = 0.95, 0.1  # every run reaches the first, no control gains the second
RESULTS = ROOT / "benchmarks" / "results" / "learn.json"


def control_of(path: str, overrides: list[str]) -> list[str]:
    """The same configuration with shuffled advantages: another name forgets the options, so they are given again."""
    advantage = config.load([path, *overrides]).advantage
    name = advantage.pop("name")
    return [
        f"advantage.name=tests/shuffled.py:{name}",
        *(f"advantage.{k}={json.dumps(v)}" for k, v in advantage.items()),
    ]


def run(path: str, seed: int, control: bool, overrides: list[str], folder: Path) -> dict:
    """One run in a process of its own; before and after are read from its report."""
    argv = [path, *overrides, f"seed={seed}", f"run={folder}", *(control_of(path, overrides) if control else [])]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train.py", *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"train.py {' '.join(argv)}\n{done.stderr.strip()}")
    table = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \|$", (folder / "report.md").read_text(), re.MULTILINE)
    row = {"config": path, "seed": seed, "control": control, "minutes": round((time.monotonic() - begun) / 60, 2)}
    measured = {n: (float(a), float(b)) for n, a, b in table if n in ("accuracy", "greedy") or n.startswith("pass@")}
    return row | measured


def passed(row: dict) -> bool:
    before, after = row["accuracy"]
    return after - before < GAIN if row["control"] else after >= GOAL


def table(rows: list[dict]) -> Table:
    names = [name for name in rows[0] if isinstance(rows[0][name], tuple)]
    shown = Table("config", "seed", *names, "minutes", "", title="held out, before → after", title_justify="left")
    for row in rows:
        name = Path(row["config"]).stem + (", shuffled advantages" if row["control"] else "")
        numbers = ["{:.3f} → {:.3f}".format(*row[n]) for n in names]
        verdict = "ok" if passed(row) else f"gains ≥ {GAIN}" if row["control"] else f"below {GOAL}"
        shown.add_row(name, str(row["seed"]), *numbers, f"{row['minutes']:.1f}", verdict)
    return shown


def device() -> str:
    """The processor's name; runs are on the CPU unless a configuration says otherwise."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, 2 threads"


def main(argv: list[str]) -> int:
    overrides = [arg for arg in argv if "=" in arg]
    configs = [arg for arg in argv if "=" not in arg] or CONFIGS
    plan = [(path, seed, False) for path in configs for seed in SEEDS] + [(path, 0, True) for path in configs]
    rows, console = [], Console(width=120)
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(plan))
        for number, (path, seed, control) in enumerate(plan):
            progress.update(bar, description=f"{Path(path).stem}, seed {seed}{', control' if control else ''}")
            rows.append(run(path, seed, control, overrides, Path(scratch) / str(number)))
            before, after = rows[-1]["accuracy"]
            console.print(f"{path} seed={seed}{' shuffled' if control else ''}: {before:.3f} → {after:.3f}")
            progress.advance(bar)
    console.print(table(rows))
    if not argv:
        versions = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({"device": device(), **versions, "rows": rows}, indent=1) + "\n")
        console.print(f"written to {RESULTS.relative_to(ROOT)}")
    return 0 if all(map(passed, rows)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
