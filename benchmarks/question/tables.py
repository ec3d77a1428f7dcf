"""The tables of the experiment's pages, from the file of results.

python -m benchmarks.question.tables [FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from benchmarks.pages import fill, table
from benchmarks.question import meter
from benchmarks.question.arms import CORNERS, ESTIMATORS
from benchmarks.question.grammar import KIND
from rlkl.run.log import read_rows

RESULTS = Path("benchmarks/results/question.jsonl")
PAGE = Path("docs/question-results.md")
PAGES = (PAGE, Path("docs/kl-or-trust-region.md"), Path("docs/hacking.md"))
EQUAL = (2.0, 4.0, 8.0)  # nats per response at which estimators are compared
NEAR = 3.0  # nothing is interpolated between two arms whose KLs differ by more than this factor


def group(rows: list[dict], name: str, arm: str | None = None) -> list[dict]:
    """The rows of a group of arms, or of one of its arms."""
    return [r for r in rows if r["group"] == name and arm in (None, r["name"])]


def reference(rows: list[dict]) -> dict[str, float]:
    """What was measured of the base."""
    return group(rows, "reference")[0]["final"]


def results(argv: list[str]) -> list[dict]:
    """The rows of the file that a command names, by default the committed one."""
    path = Path(argv[0]) if argv else RESULTS
    rows = read_rows(path)
    if not rows:
        command = f"python -m benchmarks.question.grid --out {path}"
        sys.exit(f"error: {path} holds no results: {command} makes them")
    return rows


# ------------------------------------------------------------------ cells


def seeds(rows: list[dict], of: Callable[[dict], float], form: str = ".2f") -> str:
    """One number for each seed, in the order of the seeds."""
    ordered = sorted(rows, key=lambda r: r["seed"])
    return " / ".join(f"{of(r):{form}}" for r in ordered) or "–"


def final(name: str) -> Callable[[dict], float]:
    """What an arm ends with."""
    return lambda row: row["final"][name]


def peak(name: str) -> Callable[[dict], float]:
    """The largest value of a curve."""
    return lambda row: max(x for x in row["curves"][name] if x is not None)


# ------------------------------------------------------------------ tables


def reward(rows: list[dict]) -> str:
    """What the reward model learned."""
    model = group(rows, "reference")[0]["reward_model"]
    kind = [weight for word, weight in model["words"].items() if word in KIND]
    other = [weight for word, weight in model["words"].items() if word not in KIND]
    cells = [
        str(model["pairs"]),
        f"{model['heldout_accuracy']:.1%}",
        f"{min(kind):.2f} to {max(kind):.2f}",
        f"{min(other):.2f} to {max(other):.2f}",
    ]
    head = [
        "pairs",
        "right on held-out pairs",
        "weights of kind words",
        "weights of the other words",
    ]
    return table(head, [cells])


def corners(rows: list[dict], epochs: int) -> str:
    """Reward, gold score and both KLs, one number for each seed."""
    base = reference(rows)
    names = ("proxy", "gold", "valid", "kl_pi_ref_sequence")
    lines = [["the base", *(f"{base[n]:.2f}" for n in names), "–", "–"]]
    for corner in CORNERS:
        arms = group(rows, str(epochs), corner)
        cells = [
            corner,
            seeds(arms, final("proxy"), ".1f"),
            seeds(arms, final("gold")),
            seeds(arms, final("valid")),
            seeds(arms, final("kl_pi_ref_sequence"), ".1f"),
            seeds(arms, peak("kl_old_pi"), ".2g"),
            seeds(arms, peak("gold"), ".1f"),
        ]
        lines.append(cells)
    head = [
        f"{epochs} epochs",
        "proxy",
        "gold",
        "valid",
        "KL(π‖ref) per response",
        "peak KL(π_old‖π) per token",
        "best gold during training",
    ]
    return table(head, lines)


def health(rows: list[dict]) -> str:
    """The other measurements of the corners, as means over the seeds."""
    names = ("length", "entropy", "distinct", "ref_logprob_token")
    lines = [["the base", *(f"{reference(rows)[n]:.2f}" for n in names), "–", "–", "–"]]
    for epochs in (16, 4):
        for corner in CORNERS:
            arms = group(rows, str(epochs), corner)
            if not arms:
                continue
            clipped = [x for r in arms for x in r["curves"]["clip_fraction"] if x is not None]
            cells = [
                f"{corner}, {epochs} epochs",
                *(f"{mean(map(final(n), arms)):.2f}" for n in names),
                f"{mean(clipped):.3f}" if clipped else "–",
                f"{max(map(peak('ratio_max'), arms)):.2g}",
                f"{mean(r['cpu_seconds'] for r in arms):.0f}",
            ]
            lines.append(cells)
    head = [
        "mean over the seeds",
        "length",
        "entropy per token",
        "distinct bigrams",
        "log ref per token",
        "clip fraction",
        "largest ratio",
        "CPU s",
    ]
    return table(head, lines)


def sweep(rows: list[dict], name: str) -> str:
    """What each beta of an estimator ends with, one number for each seed."""
    lines = []
    for beta in ESTIMATORS[name][1]:
        arms = group(rows, name, f"{beta:g}")
        cells = [
            f"{beta:g}",
            seeds(arms, final("proxy"), ".1f"),
            seeds(arms, final("gold")),
            seeds(arms, final("valid")),
            seeds(arms, final("kl_pi_ref_sequence"), ".1f"),
        ]
        lines.append(cells)
    return table(["beta", "proxy", "gold", "valid", "KL(π‖ref) per response"], lines)


def at_equal_kl(rows: list[dict]) -> str:
    """Gold of each estimator at the same final KL, interpolated within the sweep of each seed."""
    lines = []
    for name in ESTIMATORS:
        arms = group(rows, name)
        numbers = sorted({r["seed"] for r in arms})
        cells = [f"`{name}`"]
        for kl in EQUAL:
            golds = [between([r for r in arms if r["seed"] == seed], kl) for seed in numbers]
            cells.append(" / ".join("–" if x is None else f"{x:.2f}" for x in golds) or "–")
        lines.append(cells)
    return table(["gold at a KL(π‖ref) of", *(f"{kl:g} nats" for kl in EQUAL)], lines)


def between(arms: list[dict], kl: float) -> float | None:
    """Gold at `kl`, on the line between the nearest arms below and above it.

    None if one of them is missing, or if they are further apart than NEAR.
    """
    ends = sorted((r["final"]["kl_pi_ref_sequence"], r["final"]["gold"]) for r in arms)
    for (x0, y0), (x1, y1) in pairwise(ends):
        if x0 <= kl <= x1 <= NEAR * x0:
            return y0 + (y1 - y0) * (kl - x0) / (x1 - x0)
    return None


# ------------------------------------------------------------------ claims


class Claim(NamedTuple):
    """What the page says of an arm, and how it is tested on what one seed ends with."""

    text: str
    holds: Callable[[dict[str, float], dict[str, float]], bool]  # (final, base)


HACKED = Claim(
    "proxy above 10, gold below the base's",
    lambda x, base: x["proxy"] > 10 and x["gold"] < base["gold"],
)
BETTER = Claim("gold more than 1 above the base's", lambda x, base: x["gold"] > base["gold"] + 1)
COLLAPSED = Claim("validity below 0.2", lambda x, base: x["valid"] < 0.2)
CLAIMS = {  # (corner, epochs)
    ("neither", 16): HACKED,
    ("clip", 16): HACKED,
    ("kl", 16): COLLAPSED,
    ("both", 16): BETTER,
    ("neither", 4): HACKED,
    ("clip", 4): HACKED,
    ("kl", 4): BETTER,
    ("both", 4): BETTER,
}


def verdicts(rows: list[dict]) -> list[tuple[str, int, int]]:
    """(claim, seeds in which it holds, seeds) of every corner that was run."""
    base = reference(rows)
    verdicts = []
    for (corner, epochs), claim in CLAIMS.items():
        arms = group(rows, str(epochs), corner)
        if arms:
            holds = sum(claim.holds(r["final"], base) for r in arms)
            verdicts.append((f"{corner}, {epochs} epochs: {claim.text}", holds, len(arms)))
    return verdicts


def claims(rows: list[dict]) -> str:
    """The table of the claims."""
    lines = [[claim, f"{holds} of {count} seeds"] for claim, holds, count in verdicts(rows)]
    return table(["claim", "holds in"], lines)


# ------------------------------------------------------------------ pages


def sections(rows: list[dict]) -> dict[str, str]:
    """All tables of the pages, by the name of their marker."""
    fixed = {
        "reward": reward(rows),
        "claims": claims(rows),
        "corners-16": corners(rows, 16),
        "corners-4": corners(rows, 4),
        "health": health(rows),
        "equal": at_equal_kl(rows),
        "meter": meter.summary(rows),
    }
    return fixed | {name: sweep(rows, name) for name in ESTIMATORS}


def show(rows: list[dict]) -> None:
    """Print the corners that were run, and which claims hold."""
    for epochs in (16, 4):
        if group(rows, str(epochs)):
            print(corners(rows, epochs) + "\n")
    for claim, holds, count in verdicts(rows):
        print(f"{claim}: {holds} of {count} seeds")


def main(argv: list[str]) -> None:
    """Fill the pages."""
    fill(PAGES, sections(results(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
