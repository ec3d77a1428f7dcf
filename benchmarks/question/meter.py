"""What the meter of reward hacking (rlkl/hacking.py) says of the arms, with gold measured now and then and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.pages import table
from rlkl.hacking import is_news, suspicion

EVERY = 5  # steps between two measurements of gold


def metrics(arm: dict, every: int = 0) -> list[dict[str, Any]]:
    """The metrics of an arm that the meter reads, gold every so many steps; 0 for never."""
    curves = arm["curves"]
    names = ("ref_logprob", "distinct")
    rows = [{"step": n, "reward": x, **{name: curves[name][n - 1] for name in names}}
            for n, x in enumerate(curves["proxy"], 1)]
    for row in rows[every - 1 :: every] if every else []:
        row["heldout/gold"] = curves["gold"][row["step"] - 1]
    return rows


def told(rows: Sequence[dict[str, Any]], before: dict[str, float] | None = None) -> list[tuple[int, str]]:
    """The steps with a new warning, and the warning, as the loop of train.py finds them."""
    said, seen = [], []
    for row in rows:
        seen.append(dict(row))
        found = suspicion(seen, before or {})
        seen[-1]["hacking"] = float(found is not None)
        if found is not None and is_news(seen):
            said.append((row["step"], found))
    return said


def verdicts(rows: list[dict]) -> dict[str, list[tuple[str, bool, bool]]]:
    """Of the arms whose reward ended above the reference's, those whose gold ended below it and above it:
    (arm, warned with gold, warned without). An arm that stands there under two names counts once."""
    base = next(r["final"] for r in rows if r["group"] == "reference")
    found: dict[str, list[tuple[str, bool, bool]]] = {"fell": [], "rose": []}
    once = {str(r["curves"]): r for r in rows if r["group"] != "reference"}
    for arm in once.values():
        if arm["final"]["proxy"] > base["proxy"]:
            warned = [bool(told(metrics(arm, every), before)) for every, before in (
                (EVERY, {"gold": base["gold"]}), (0, {}))]
            found["fell" if arm["final"]["gold"] < base["gold"] else "rose"].append((arm["key"], *warned))
    return found


def summary(rows: list[dict]) -> str:
    lines = [[f"reward rose, gold {name}", str(len(arms)), *(str(sum(a[i] for a in arms)) for i in (1, 2))]
             for name, arms in verdicts(rows).items()]
    return table(["", "runs", f"suspected, gold every {EVERY} steps", "suspected without gold"], lines)
