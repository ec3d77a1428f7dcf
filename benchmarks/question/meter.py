"""What the detector of reward hacking (rlkl/run/reward_hacking.py) says of the arms.

Once with the gold score measured now and then, as a held-out metric, and once without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.pages import table
from rlkl.run.reward_hacking import is_news, suspicion

EVERY = 5  # steps between two measurements of gold
CURVES = {"ref_logprob": "ref_logprob", "distinct_2": "distinct"}  # metric → curve of an arm


class Verdict(NamedTuple):
    """Was an arm suspected?"""

    arm: str
    with_gold: bool
    without_gold: bool


def metrics(arm: dict, every: int = 0) -> list[dict[str, Any]]:
    """The rows that the detector reads. every: steps between two values of gold; 0 for none."""
    curves = arm["curves"]
    rows = []
    for i, proxy in enumerate(curves["proxy"]):
        row = {"step": i + 1, "reward": proxy}
        row |= {metric: curves[curve][i] for metric, curve in CURVES.items()}
        if every and row["step"] % every == 0:
            row["eval/gold"] = curves["gold"][i]
        rows.append(row)
    return rows


def warnings_of(
    rows: Sequence[dict[str, Any]], before: dict[str, float] | None = None
) -> list[tuple[int, str]]:
    """(step, warning) of every warning that a run with these metrics would print."""
    warnings = []
    seen = []
    for row in rows:
        seen.append(dict(row))
        warning = suspicion(seen, before or {})
        seen[-1]["reward_hacking"] = float(warning is not None)
        if warning is not None and is_news(seen):
            warnings.append((row["step"], warning))
    return warnings


def verdicts(rows: list[dict]) -> dict[str, list[Verdict]]:
    """The arms whose reward ended above the reference's, by whether gold "fell" below it or "rose".

    An arm that stands in the file under two names counts once.
    """
    base = next(r["final"] for r in rows if r["group"] == "reference")
    distinct = {str(r["curves"]): r for r in rows if r["group"] != "reference"}
    verdicts: dict[str, list[Verdict]] = {"fell": [], "rose": []}
    for arm in distinct.values():
        if arm["final"]["proxy"] > base["proxy"]:
            with_gold = warnings_of(metrics(arm, EVERY), {"gold": base["gold"]})
            without_gold = warnings_of(metrics(arm))
            verdict = Verdict(arm["key"], bool(with_gold), bool(without_gold))
            verdicts["fell" if arm["final"]["gold"] < base["gold"] else "rose"].append(verdict)
    return verdicts


def summary(rows: list[dict]) -> str:
    """The table of docs/hacking.md."""
    lines = []
    for name, arms in verdicts(rows).items():
        with_gold = sum(arm.with_gold for arm in arms)
        without_gold = sum(arm.without_gold for arm in arms)
        lines.append(
            [f"reward rose, gold {name}", str(len(arms)), f"{with_gold}", f"{without_gold}"]
        )
    head = ["", "runs", f"suspected, gold every {EVERY} steps", "suspected without gold"]
    return table(head, lines)
