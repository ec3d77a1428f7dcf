"""Every configuration for a CPU as it stands, and the runs that the pages quote beside them:  make measure

    python -m benchmarks.measured [--only PATTERN]     the parts of the tiny-rlhf pipeline need those before them

Each run is a row of benchmarks/results/examples.json, and the pages' tables are filled from these rows. Seconds are of
one core; who has no base model of a task yet makes it in the first run that needs it, up to a minute more.
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
from rlkl import runs
from rlkl.terminal import console

RESULTS = ROOT / "benchmarks" / "results" / "examples.json"
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("examples", "preferences", "models")]
HACKED = ("kl_ref.coef=0", "optim.lr=1e-3", "optim.steps=80", "optim.schedule=constant", "eval.every=5")
GREEDY_DPO = ("beta=0.1", "optim.lr=3e-4", "optim.epochs=2", "run=runs/tiny-rlhf/dpo-far")
MORE = (  # the first evaluation of a run is that of the model it starts from: so a model of dpo is graded
    ("tiny-grpo", ("run=runs/grpo", "optim.steps=100")), ("tiny-lora", ("run=runs/lora", "optim.steps=40")),
    ("tiny-lora", ("seed=1",)), ("tiny-lora", ("optim.lr=1e-3",)), ("tiny-lora", ("lora.full=[]",)),
    ("tiny-rlhf-grpo", HACKED), ("tiny-dpo", GREEDY_DPO),
    ("tiny-rlhf-grpo", ("model.name=runs/tiny-rlhf/dpo/model", "optim.steps=1")),
    ("tiny-rlhf-grpo", ("model.name=runs/tiny-rlhf/dpo-far/model", "optim.steps=1")))
NOT_WHOLE = ("scratch-sft", "scratch-countdown")  # for a GPU as they stand


class Row(NamedTuple):
    """A run: its CPU seconds, before and after by name, what the meter of reward hacking said."""

    config: str
    overrides: list[str]
    seconds: float
    found: dict[str, list[float]]
    hacking: str | None
    git: str  # the revision it was made at


def chosen() -> list[Example]:
    """In the order of the pipeline."""
    known = {e.config: e for e in EXAMPLES}
    return [e._replace(overrides=()) for e in EXAMPLES if e.config not in NOT_WHOLE] + [
        known[name]._replace(overrides=overrides) for name, overrides in MORE]


def run(example: Example, folder: Path) -> Row:
    """SystemExit with its last line if it fails: nothing is written of it."""
    done, seconds = start(example, folder)
    found, one = shown(done.stdout), measured(done.stdout, example.shown)
    if done.returncode or one is None:
        sys.exit(f"error: {example.config} {' '.join(example.overrides)}: {reason(done)}")
    warned = re.search(r"reward hacking\? (.*?): +docs/hacking\.md", " ".join(done.stdout.split()))
    return Row(example.config, list(example.overrides), round(seconds, 1), found or {example.shown: one},
               warned[1] if warned else None, runs.git("rev-parse", "HEAD") or "")


# The tables
def row(rows: list[Row], config: str, *overrides: str) -> Row:
    return next(r for r in rows if r.config == config and r.overrides == list(overrides))


def sections(rows: list[Row]) -> dict[str, str]:
    return {"measured": every(rows), "preferences": preferences(rows), "lora": lora(rows)}


def every(rows: list[Row]) -> str:
    """Each configuration, what its first line says it shows, how long it takes, what it changes."""
    lines = []
    for example in chosen():
        if not example.overrides:
            found = row(rows, example.config)
            (before, after), name = found.found[example.shown], example.shown
            change = f"{after:,.0f} {name}" if name == "pairs" else f"{name} {before:.3f} → {after:.3f}"
            lines.append([f"[{example.config}](../configs/{example.config}.yaml)", about(example.config),
                          duration(found.seconds), change])
    return table(["config", "what it shows", "CPU time", "before → after"], lines)


def about(config: str) -> str:
    """The first sentence of its first line, without the command that it names."""
    first = (ROOT / "configs" / f"{config}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return re.sub(r"^# (rlkl [\w-]+: )?|\. CPU.*$", "", first)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def preferences(rows: list[Row]) -> str:
    """Gold of each way to learn from the same pairs; its change against the same replies before."""
    def line(name: str, run: Row, when: int) -> list[str]:
        return [name, f"{run.found['gold'][when]:.2f}", f"{run.found['accuracy'][when]:.2f}"]

    dpo = row(rows, "tiny-rlhf-grpo", "model.name=runs/tiny-rlhf/dpo/model", "optim.steps=1")
    ppo, grpo = row(rows, "tiny-rlhf-ppo"), row(rows, "tiny-rlhf-grpo")
    return table(["", "gold score, -1 to 1", "both adjectives kind"], [
        line("sft", ppo, 0), line("PPO, beta = 0.2", ppo, 1), line("GRPO, beta = 0.2", grpo, 1),
        line("DPO, beta = 1", dpo, 0)])


def lora(rows: list[Row]) -> str:
    named = {"all weights, lr 3e-4": row(rows, "tiny-grpo"),
             "LoRA, r = 16, and the last norm, lr 3e-3": row(rows, "tiny-lora"),
             "the same, another seed": row(rows, "tiny-lora", "seed=1"),
             "the same, lr 1e-3": row(rows, "tiny-lora", "optim.lr=1e-3"),
             "LoRA alone, lr 3e-3": row(rows, "tiny-lora", "lora.full=[]")}
    return table(["", "sampled", "greedy"], [
        [name, *(f"{found.found[key][1]:.3f}" for key in ("accuracy", "greedy"))] for name, found in named.items()])


# The file
def same(row: Row, example: Example) -> bool:
    return (row.config, row.overrides) == (example.config, list(example.overrides))


def read() -> tuple[dict, list[Row]]:
    """Where it was measured, and the rows."""
    tree = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"where": {}, "rows": []}
    return tree["where"], [Row(**r) for r in tree["rows"]]


def write(where: dict, rows: list[Row]) -> None:
    tree = json.dumps({"where": where, "rows": [r._asdict() for r in rows]}, indent=1)
    RESULTS.write_text(tree + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression")
    options, rows, where = parser.parse_args(argv), read()[1], runs.provenance("make measure")
    with tempfile.TemporaryDirectory() as folder:
        for example in chosen():
            if re.search(options.only, " ".join([example.config, *example.overrides])):
                new = run(example, Path(folder))
                rows = [r for r in rows if not same(r, example)] + [new]
                write(where, rows)
                console.print(new.config, *new.overrides, duration(new.seconds), new.found, soft_wrap=True)
    if missing := [" ".join([e.config, *e.overrides]) for e in chosen() if not any(same(r, e) for r in rows)]:
        sys.exit(f"the pages are as they were: {', '.join(missing)} not yet run")
    fill(PAGES, sections(rows))


if __name__ == "__main__":
    main()
