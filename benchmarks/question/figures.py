"""The pictures of docs/question-results.md, from the file of results alone: python -m benchmarks.question.figures."""

from __future__ import annotations

import math
import statistics
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.question import setting, simplex
from benchmarks.question.arms import CORNERS
from benchmarks.question.grammar import KIND, LETTER, SENTENCE
from benchmarks.question.tables import group, reference, results

DOCS = Path("docs")
STYLE = {"svg.hashsalt": "rlkl", "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}
COLORS = {"neither": "#D55E00", "clip": "#E69F00", "kl": "#0072B2", "both": "#009E73"}  # Okabe and Ito
NAMES = {"neither": "no KL, no clip", "clip": "clip alone", "kl": "KL alone", "both": "KL and clip"}
LINES = {"neither": "--", "clip": "-", "kl": "--", "both": "-"}  # solid with the clip
SWEEPS = {"k1": ("k1 in the reward", "o", "#009E73"), "k3": ("k3 in the loss (GRPO)", "s", "#CC79A7"),
          "exact": ("exact KL at each token, in the loss", "^", "#0072B2"),
          "wk3_token": ("w·k3 at each token, in the loss", "v", "#E69F00"),
          "wk3_prefix": ("w·k3 of the reply, in the loss", "D", "#D55E00"),
          "rao_blackwell": ("exact KL of the reply, in the loss", "P", "#56B4E9")}
FLOOR = 1e-4  # what a logarithmic axis shows of 0


def corners_over_time(rows: list[dict]) -> Figure:
    """Proxy and gold in the four corners, 16 epochs a rollout; one line a seed."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    grid = figure.subplots(2, 4, sharex=True, sharey="row")
    for column, corner in zip(grid.T, CORNERS, strict=True):
        for axes, curve in zip(column, ("proxy", "gold"), strict=True):
            for row in group(rows, "16", corner):
                axes.plot(range(1, 1 + len(row["curves"][curve])), row["curves"][curve], color=COLORS[corner], lw=1.3)
            axes.axhline(reference(rows)[curve], color="black", lw=0.8, ls=":")
        column[0].set_title(NAMES[corner], color=COLORS[corner], weight="bold")
        column[1].set_xlabel("rollout")
    grid[0, 0].set_ylabel("proxy: what is paid")
    grid[1, 0].set_ylabel("gold: what is wanted")
    grid[1, 0].annotate("the base", (0.98, reference(rows)["gold"]), xycoords=("axes fraction", "data"),
                        ha="right", va="bottom", fontsize=8)
    return figure


def goodhart(rows: list[dict]) -> Figure:
    """Gold against the distance sqrt(KL(pi || ref)) on the way of every arm; markers are where they end."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for corner in CORNERS:
        for epochs, marker in (("4", "o"), ("16", "X")):
            for i, row in enumerate(group(rows, epochs, corner)):
                x = [math.sqrt(max(kl, 0)) for kl in row["curves"]["kl_pi_ref_seq"]]
                left.plot(x, row["curves"]["gold"], color=COLORS[corner], lw=0.8, alpha=0.5)
                left.plot(math.sqrt(row["final"]["kl_pi_ref_seq"]), row["final"]["gold"], marker, ms=6,
                          color=COLORS[corner], label=NAMES[corner] if epochs == "4" and not i else None,
                          mec="white", mew=0.6)
    left.set_title("the corners, and where they end (• 4 epochs, × 16)")
    for name, (label, marker, color) in SWEEPS.items():
        ends = [(math.sqrt(r["final"]["kl_pi_ref_seq"]), r["final"]["gold"]) for r in group(rows, name)]
        if ends:
            right.plot(*zip(*ends, strict=True), marker, color=color, label=label, ms=5, mec="white", mew=0.5)
    right.set_title("where the sweeps over beta end (the largest beta: left)")
    for axes in (left, right):
        axes.axhline(reference(rows)["gold"], color="black", lw=0.8, ls=":")
        axes.set_xlabel("√KL(π ‖ ref) of a reply, √nats")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper right")
    left.set_ylabel("gold")
    return figure


def which_knob(rows: list[dict]) -> Figure:
    """Both KLs over one time axis: the geometric mean of the seeds, and each of them thin."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, epochs in zip(grid.T, ("4", "16"), strict=True):
        for axes, curve in zip(column, ("kl_pi_ref_seq", "kl_old_pi"), strict=True):
            for corner in CORNERS:
                lines(axes, [r["curves"][curve] for r in group(rows, epochs, corner)], corner)
            axes.set_yscale("log")
        column[0].set_title(f"{epochs} epochs on each rollout", weight="bold")
        column[1].set_xlabel("rollout")
    grid[0, 0].set_ylim(0.2, 400)
    grid[0, 0].set_ylabel("KL(π ‖ ref)\nnats a reply")
    grid[1, 0].set_ylabel("KL(π_old ‖ π)\nnats a token")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def lines(axes: Axes, runs: list[list[float]], corner: str) -> None:
    floored = [[max(x, FLOOR) for x in run] for run in runs]
    for run in floored:
        axes.plot(range(1, 1 + len(run)), run, LINES[corner], color=COLORS[corner], lw=0.6, alpha=0.6)
    if floored:
        middle = [statistics.geometric_mean(x) for x in zip(*floored, strict=True)]
        axes.plot(range(1, 1 + len(middle)), middle, LINES[corner], color=COLORS[corner], lw=2, label=NAMES[corner])


def samples(rows: list[dict], seed: int = 1, shown: int = 3) -> Figure:
    """What is said before, and after in the four corners."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    grid = figure.subplot_mosaic([["before", "before"], ["neither", "clip"], ["kl", "both"]], height_ratios=[2, 3, 3])
    first = next(row for row in rows if row["group"] == "reference")
    write(grid["before"], "before: the base", "black", first, shown, width=129)
    for corner in CORNERS:
        row = next((r for r in group(rows, "16", corner) if r["seed"] == seed), None)
        if row is not None:
            write(grid[corner], f"after: {NAMES[corner]}", COLORS[corner], row, shown, width=64)
    figure.text(0.5, -0.02, "bold: a kind word inside a complete sentence     black: in a complete sentence     "
                "grey: in none", ha="center", fontsize=8)
    return figure


def write(axes: Axes, title: str, color: str, row: dict, shown: int, width: int) -> None:
    """Replies in a fixed-width font, each word in the colour of what it is worth."""
    axes.set(xlim=(0, width), xticks=[], yticks=[])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set(visible=True, color=color, lw=1.2)
    found = "   ".join(f"{name} {row['final'][name]:.2g}" for name in ("proxy", "gold", "valid"))
    axes.set_title(title, color=color, weight="bold", loc="left")
    axes.set_title(found, loc="right", fontsize=9)
    lines = [(line, marks) for reply in row["samples"][:shown] for line, marks in wrapped(reply, width - 2)]
    axes.set_ylim(len(lines) + 0.2, -0.7)
    for y, (words, marks) in enumerate(lines):
        x = 1
        for word, mark in zip(words, marks, strict=True):
            look = {"color": "black" if mark else "0.6", "weight": "bold" if mark and word in KIND else "normal"}
            axes.text(x, y, word, family="monospace", fontsize=8.2, va="center", **look)
            x += len(word) + 1


def wrapped(reply: str, width: int) -> Iterable[tuple[list[str], list[bool]]]:
    """Lines of words, and whether each word is in a complete sentence. At most two lines of a reply."""
    words = reply.split() or ["(nothing)"]
    inside = [False] * len(words)
    for match in SENTENCE.finditer("".join(LETTER.get(word, "?") for word in words)):
        inside[slice(*match.span())] = [True] * (match.end() - match.start())
    start = 0
    for line in textwrap.wrap(" ".join(words), width, max_lines=2, placeholder=" …"):
        shown = line.split()
        yield shown, [*inside[start : start + len(shown)], False][: len(shown)]
        start += len(shown)


def main(argv: list[str]) -> None:
    rows = results(argv)
    with matplotlib.rc_context(STYLE):
        figures = {"setting": setting.draw(), "simplex": simplex.draw(), "corners": corners_over_time(rows),
                   "goodhart": goodhart(rows), "knobs": which_knob(rows), "samples": samples(rows)}
        for name, figure in figures.items():
            path = DOCS / f"question-{name}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
