"""The tables of the question's pages, from the file of results alone: python -m benchmarks.question.tables."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean

from benchmarks.pages import fill, table
from benchmarks.question import meter
from benchmarks.question.arms import CORNERS, ESTIMATORS
from benchmarks.question.grammar import KIND
from rlkl.log import read_rows

RESULTS = Path("benchmarks/results/question.jsonl")
PAGE = Path("docs/question-results.md")
PAGES = (PAGE, Path("docs/kl-or-trust-region.md"), Path("docs/hacking.md"))
EQUAL = (2.0, 4.0, 8.0)  # nats a reply, at which estimators are compared
NEAR = 3.0  # ends further apart than this factor of KL say nothing of what is between them


def group(rows: list[dict], name: str, arm: str | None = None) -> list[dict]:
    return [r for r in rows if r["group"] == name and arm in (None, r["name"])]


def reference(rows: list[dict]) -> dict[str, float]:
    return group(rows, "reference")[0]["final"]


def results(argv: list[str]) -> list[dict]:
    """The rows of the file that a command names, or of the one that is committed."""
    path = Path(argv[0]) if argv else RESULTS
    if not (rows := read_rows(path)):
        sys.exit(f"error: {path} holds no results: python -m benchmarks.question.grid --out {path} makes them")
    return rows


def reward(rows: list[dict]) -> str:
    """What the reward model learned."""
    found = group(rows, "reference")[0]["reward_model"]
    kind, other = ([w for word, w in found["words"].items() if (word in KIND) == wanted] for wanted in (True, False))
    return table(["pairs", "right on held-out pairs", "weights of kind words", "weights of the other words"],
                 [[str(found["pairs"]), f"{found['heldout_accuracy']:.1%}",
                   *(f"{min(ws):.2f} to {max(ws):.2f}" for ws in (kind, other))]])


def seeds(rows: list[dict], of: Callable[[dict], float], form: str = ".2f") -> str:
    """One number a seed, in the order of the seeds."""
    return " / ".join(f"{of(r):{form}}" for r in sorted(rows, key=lambda r: r["seed"])) or "–"


def final(name: str) -> Callable[[dict], float]:
    return lambda row: row["final"][name]


def peak(name: str) -> Callable[[dict], float]:
    """The largest value on the way."""
    return lambda row: max(x for x in row["curves"][name] if x is not None)


def corners(rows: list[dict], epochs: int) -> str:
    """A number a seed: what is paid, what is wanted, and both KLs."""
    base = reference(rows)
    lines = [["the base", *(f"{base[n]:.2f}" for n in ("proxy", "gold", "valid", "kl_pi_ref_seq")), "–", "–"]]
    for corner in CORNERS:
        arms = group(rows, str(epochs), corner)
        lines.append([corner, seeds(arms, final("proxy"), ".1f"), seeds(arms, final("gold")),
                      seeds(arms, final("valid")), seeds(arms, final("kl_pi_ref_seq"), ".1f"),
                      seeds(arms, peak("kl_old_pi"), ".2g"), seeds(arms, peak("gold"), ".1f")])
    return table([f"{epochs} epochs", "proxy", "gold", "valid", "KL(π‖ref), a reply", "peak KL(π_old‖π), a token",
                  "best gold on the way"], lines)


def health(rows: list[dict]) -> str:
    """Means over seeds of the other measurements, at both numbers of epochs."""
    names = ("length", "entropy", "distinct", "ref_logprob_tok")
    lines = [["the base", *(f"{reference(rows)[n]:.2f}" for n in names), "–", "–", "–"]]
    for epochs in (16, 4):
        for corner in CORNERS:
            arms = group(rows, str(epochs), corner)
            if arms:
                clipped = [x for r in arms for x in r["curves"]["clip_fraction"] if x is not None]
                lines.append([f"{corner}, {epochs} epochs", *(f"{mean(map(final(n), arms)):.2f}" for n in names),
                              f"{mean(clipped):.3f}" if clipped else "–", f"{max(map(peak('ratio_max'), arms)):.2g}",
                              f"{mean(r['cpu_seconds'] for r in arms):.0f}"])
    return table(["mean of the seeds", "length", "entropy, a token", "distinct bigrams", "log ref, a token",
                  "clip fraction", "largest ratio", "CPU s"], lines)


def sweep(rows: list[dict], name: str) -> str:
    lines = []
    for beta in ESTIMATORS[name][1]:
        arms = group(rows, name, f"{beta:g}")
        lines.append([f"{beta:g}", seeds(arms, final("proxy"), ".1f"), seeds(arms, final("gold")),
                      seeds(arms, final("valid")), seeds(arms, final("kl_pi_ref_seq"), ".1f")])
    return table(["beta", "proxy", "gold", "valid", "KL(π‖ref), a reply"], lines)


def at_equal_kl(rows: list[dict]) -> str:
    """Gold of each estimator at the same final KL: linear between the two ends of a seed's sweep that enclose it."""
    lines = []
    for name in ESTIMATORS:
        cells = []
        for kl in EQUAL:
            found = [between([r for r in group(rows, name) if r["seed"] == seed], kl)
                     for seed in sorted({r["seed"] for r in group(rows, name)})]
            cells.append(" / ".join("–" if x is None else f"{x:.2f}" for x in found) or "–")
        lines.append([f"`{name}`", *cells])
    return table(["gold at a KL(π‖ref) of", *(f"{kl:g} nats" for kl in EQUAL)], lines)


def between(arms: list[dict], kl: float) -> float | None:
    """Gold at `kl` on the line through the nearest ends below and above; None if one is missing, or they are far."""
    ends = sorted((r["final"]["kl_pi_ref_seq"], r["final"]["gold"]) for r in arms)
    for (x0, y0), (x1, y1) in pairwise(ends):
        if x0 <= kl <= x1 <= NEAR * x0:
            return y0 + (y1 - y0) * (kl - x0) / (x1 - x0)
    return None


def verdicts(rows: list[dict]) -> list[tuple[str, int, int]]:
    """(claim, seeds in which it holds, seeds) for every corner that was run."""
    base = reference(rows)

    def hacked(x: dict[str, float]) -> bool:
        return x["proxy"] > 10 and x["gold"] < base["gold"]

    def better(x: dict[str, float]) -> bool:
        return x["gold"] > base["gold"] + 1

    over, well = "proxy above 10, gold below the base's", "gold more than 1 above the base's"
    tests: dict[tuple[str, int], tuple[str, Callable[[dict[str, float]], bool]]] = {
        ("neither", 16): (over, hacked), ("clip", 16): (over, hacked),
        ("kl", 16): ("validity below 0.2", lambda x: x["valid"] < 0.2), ("both", 16): (well, better),
        ("neither", 4): (over, hacked), ("clip", 4): (over, hacked), ("kl", 4): (well, better),
        ("both", 4): (well, better)}
    found = []
    for (corner, epochs), (claim, holds) in tests.items():
        if arms := group(rows, str(epochs), corner):
            found.append((f"{corner}, {epochs} epochs: {claim}", sum(holds(r["final"]) for r in arms), len(arms)))
    return found


def claims(rows: list[dict]) -> str:
    return table(["claim", "holds in"], [[claim, f"{n} of {of} seeds"] for claim, n, of in verdicts(rows)])


def sections(rows: list[dict]) -> dict[str, str]:
    """What stands between `<!-- name -->` and `<!-- /name -->` on the pages."""
    fixed = {"reward": reward(rows), "claims": claims(rows), "corners-16": corners(rows, 16),
             "corners-4": corners(rows, 4), "health": health(rows), "equal": at_equal_kl(rows),
             "meter": meter.summary(rows)}
    return fixed | {name: sweep(rows, name) for name in ESTIMATORS}


def show(rows: list[dict]) -> None:
    """On the terminal: the corners that were run, and which claims hold."""
    for epochs in (16, 4):
        if group(rows, str(epochs)):
            print(corners(rows, epochs) + "\n")
    for claim, holds, of in verdicts(rows):
        print(f"{claim}: {holds} of {of} seeds")


def main(argv: list[str]) -> None:
    fill(PAGES, sections(results(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
