"""`make measure`: run every configuration for a CPU as it stands, and the runs that pages quote.

    python -m benchmarks.measured [--only PATTERN]

Each run becomes a row of benchmarks/results/examples.json, and the tables of the pages are filled
from these rows. The parts of the tiny-rlhf pipeline need those before them. Seconds are CPU seconds
of one thread. The first run of a task also makes its tiny base model, up to a minute more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.examples import EXAMPLES, ROOT, Example, measured, reason, shown, start
from benchmarks.pages import fill, table
from rlkl.run import folder as runs
from rlkl.run.terminal import console

RESULTS = ROOT / "benchmarks" / "results" / "examples.json"
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("examples", "preferences", "models")]
HACKED = (
    "kl_ref.coef=0",
    "model.reference=true",
    "optim.lr=1e-3",
    "optim.steps=80",
    "optim.schedule=constant",
    "eval.every=5",
)
GREEDY_DPO = ("beta=0.1", "optim.lr=3e-4", "optim.epochs=2", "run=runs/tiny-rlhf/dpo-far")
# `rlkl dpo` does not grade its model. The first evaluation of a run that starts from it does.
GRADE_DPO = ("model.name=runs/tiny-rlhf/dpo/model", "optim.steps=1")
GRADE_GREEDY_DPO = ("model.name=runs/tiny-rlhf/dpo-far/model", "optim.steps=1")
MORE = (
    ("tiny-grpo", ("run=runs/grpo", "optim.steps=100")),
    ("tiny-lora", ("run=runs/lora", "optim.steps=40")),
    ("tiny-lora", ("seed=1",)),
    ("tiny-lora", ("optim.lr=1e-3",)),
    ("tiny-lora", ("lora.modules_to_save=[]",)),
    ("tiny-rlhf-grpo", HACKED),
    ("tiny-dpo", GREEDY_DPO),
    ("tiny-rlhf-grpo", GRADE_DPO),
    ("tiny-rlhf-grpo", GRADE_GREEDY_DPO),
)
NOT_WHOLE = ("scratch-sft", "scratch-countdown")  # without overrides they are for a GPU


class Row(NamedTuple):
    """One run, as it stands in the file of results."""

    config: str
    overrides: list[str]
    seconds: float  # of CPU time
    found: dict[str, list[float]]  # {name: [before, after]}
    hacking: str | None  # the first warning of reward hacking
    git: str  # the revision that was run


def all_runs() -> list[Example]:
    """All runs, in the order of the pipeline."""
    by_config = {example.config: example for example in EXAMPLES}
    unchanged = [e._replace(overrides=()) for e in EXAMPLES if e.config not in NOT_WHOLE]
    more = [by_config[name]._replace(overrides=overrides) for name, overrides in MORE]
    return unchanged + more


def run(example: Example, folder: Path) -> Row:
    """Run one example. SystemExit with its last line if it fails."""
    done, seconds = start(example, folder)
    numbers = measured(done.stdout, example.shown)
    if done.returncode or numbers is None:
        sys.exit(f"error: {example.config} {' '.join(example.overrides)}: {reason(done)}")
    output = " ".join(done.stdout.split())
    warning = re.search(r"reward hacking\? (.*?): +docs/hacking\.md", output)
    return Row(
        config=example.config,
        overrides=list(example.overrides),
        seconds=round(seconds, 1),
        found=shown(done.stdout) or {example.shown: numbers},
        hacking=warning[1] if warning else None,
        git=runs.git("rev-parse", "HEAD") or "",
    )


# ------------------------------------------------------------------ tables


def row(rows: list[Row], config: str, *overrides: str) -> Row:
    """The row of a run. StopIteration if there is none."""
    return next(r for r in rows if r.config == config and r.overrides == list(overrides))


def sections(rows: list[Row]) -> dict[str, str]:
    """The tables of the pages, by the name of their marker."""
    return {"measured": every(rows), "preferences": preferences(rows), "lora": lora(rows)}


def every(rows: list[Row]) -> str:
    """Each configuration: what it shows, how long it takes, and what it changes."""
    lines = []
    for example in all_runs():
        if example.overrides:
            continue
        result = row(rows, example.config)
        name = example.shown
        before, after = result.found[name]
        change = f"{name} {before:.3f} → {after:.3f}"
        if name == "pairs":
            change = f"{after:,.0f} pairs"
        link = f"[{example.config}](../configs/{example.config}.yaml)"
        lines.append([link, about(example.config), duration(result.seconds), change])
    return table(["config", "what it shows", "CPU time", "before → after"], lines)


def about(config: str) -> str:
    """The first sentence of a configuration's first line, without the command that it names."""
    first = (ROOT / "configs" / f"{config}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return re.sub(r"^# (rlkl [\w-]+: )?|\. CPU.*$", "", first)


def duration(seconds: float) -> str:
    """Seconds below a minute, else minutes."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def preferences(rows: list[Row]) -> str:
    """Gold score and accuracy of each way to learn from the same pairs."""
    ppo = row(rows, "tiny-rlhf-ppo").found
    grpo = row(rows, "tiny-rlhf-grpo").found
    dpo = row(rows, "tiny-rlhf-grpo", *GRADE_DPO).found
    before, after = 0, 1
    models = {
        "sft": (ppo, before),
        "PPO, beta = 0.2": (ppo, after),
        "GRPO, beta = 0.2": (grpo, after),
        "DPO, beta = 1": (dpo, before),
    }
    lines = [
        [name, f"{numbers['gold'][when]:.2f}", f"{numbers['accuracy'][when]:.2f}"]
        for name, (numbers, when) in models.items()
    ]
    return table(["", "gold score, -1 to 1", "both adjectives kind"], lines)


def lora(rows: list[Row]) -> str:
    """Held-out accuracy after training all weights, and after training a LoRA adapter."""
    results = {
        "all weights, lr 5e-4": row(rows, "tiny-grpo"),
        "LoRA, r = 16, and the last norm, lr 3e-3": row(rows, "tiny-lora"),
        "the same, another seed": row(rows, "tiny-lora", "seed=1"),
        "the same, lr 1e-3": row(rows, "tiny-lora", "optim.lr=1e-3"),
        "LoRA alone, lr 3e-3": row(rows, "tiny-lora", "lora.modules_to_save=[]"),
    }
    lines = [
        [name, f"{result.found['accuracy'][1]:.3f}", f"{result.found['greedy'][1]:.3f}"]
        for name, result in results.items()
    ]
    return table(["", "sampled", "greedy"], lines)


# ------------------------------------------------------------------ the file of results


def same(row: Row, example: Example) -> bool:
    """Is this the row of that example?"""
    return (row.config, row.overrides) == (example.config, list(example.overrides))


def read() -> tuple[dict, list[Row]]:
    """Where the results were measured, and the rows."""
    if not RESULTS.exists():
        return {}, []
    tree = json.loads(RESULTS.read_text(encoding="utf-8"))
    return tree["where"], [Row(**r) for r in tree["rows"]]


def write(where: dict, rows: list[Row]) -> None:
    """Write the file of results."""
    tree = json.dumps({"where": where, "rows": [r._asdict() for r in rows]}, indent=1)
    RESULTS.write_text(tree + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run the examples, write each row when it is done, and fill the pages if none is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression")
    args = parser.parse_args(argv)
    where = runs.provenance("make measure")
    rows = read()[1]
    with tempfile.TemporaryDirectory() as folder:
        for example in all_runs():
            if not re.search(args.only, " ".join([example.config, *example.overrides])):
                continue
            new = run(example, Path(folder))
            rows = [r for r in rows if not same(r, example)] + [new]
            write(where, rows)
            seconds = duration(new.seconds)
            console.print(new.config, *new.overrides, seconds, new.found, soft_wrap=True)
    missing = [example for example in all_runs() if not any(same(r, example) for r in rows)]
    if missing:
        names = ", ".join(" ".join([e.config, *e.overrides]) for e in missing)
        sys.exit(f"the pages were not changed: not yet run: {names}")
    fill(PAGES, sections(rows))


if __name__ == "__main__":
    main()
