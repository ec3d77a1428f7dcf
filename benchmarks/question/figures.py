"""The pictures of docs/question-results.md, from the file of results.

python -m benchmarks.question.figures [FILE]
"""

from __future__ import annotations

import math
import statistics
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.question import setting, simplex
from benchmarks.question.arms import CORNERS
from benchmarks.question.grammar import KIND, LETTER, SENTENCE
from benchmarks.question.tables import group, reference, results

DOCS = Path("docs")
STYLE = {
    "svg.hashsalt": "rlkl",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
# Colours that colour-blind readers can tell apart (Okabe and Ito).
COLORS = {"neither": "#D55E00", "clip": "#E69F00", "kl": "#0072B2", "both": "#009E73"}
NAMES = {"neither": "no KL, no clip", "clip": "clip alone", "kl": "KL alone", "both": "KL and clip"}
LINES = {"neither": "--", "clip": "-", "kl": "--", "both": "-"}  # solid with the clip
SWEEPS = {  # estimator → (label, marker, colour)
    "k1": ("k1 in the reward", "o", "#009E73"),
    "k3": ("k3 in the loss (GRPO)", "s", "#CC79A7"),
    "exact": ("exact KL at each token, in the loss", "^", "#0072B2"),
    "wk3_token": ("w·k3 at each token, in the loss", "v", "#E69F00"),
    "wk3_prefix": ("w·k3 of the response, in the loss", "D", "#D55E00"),
    "rao_blackwell": ("exact KL of the response, in the loss", "P", "#56B4E9"),
}
FLOOR = 1e-4  # smaller values are drawn here on a logarithmic axis


def corners_over_time(rows: list[dict]) -> Figure:
    """Proxy and gold in the four corners at 16 epochs per rollout, one line for each seed."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    grid = figure.subplots(2, 4, sharex=True, sharey="row")
    base = reference(rows)
    for column, corner in zip(grid.T, CORNERS, strict=True):
        for axes, curve in zip(column, ("proxy", "gold"), strict=True):
            for row in group(rows, "16", corner):
                y = row["curves"][curve]
                axes.plot(range(1, 1 + len(y)), y, color=COLORS[corner], lw=1.3)
            axes.axhline(base[curve], color="black", lw=0.8, ls=":")
        column[0].set_title(NAMES[corner], color=COLORS[corner], weight="bold")
        column[1].set_xlabel("rollout")
    grid[0, 0].set_ylabel("proxy: what is paid")
    grid[1, 0].set_ylabel("gold: what is wanted")
    grid[1, 0].annotate(
        "the base",
        (0.98, base["gold"]),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
    )
    return figure


def goodhart(rows: list[dict]) -> Figure:
    """Gold over the distance sqrt(KL(pi || ref)); markers are where the arms end."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for corner in CORNERS:
        for epochs, marker in (("4", "o"), ("16", "X")):
            label = NAMES[corner] if epochs == "4" else None
            draw_paths(left, group(rows, epochs, corner), COLORS[corner], marker, label)
    left.set_title("the corners, and where they end (• 4 epochs, × 16)")
    for name, (label, marker, color) in SWEEPS.items():
        arms = group(rows, name)
        if arms:
            x = [math.sqrt(r["final"]["kl_pi_ref_sequence"]) for r in arms]
            y = [r["final"]["gold"] for r in arms]
            right.plot(x, y, marker, color=color, label=label, ms=5, mec="white", mew=0.5)
    right.set_title("where the sweeps over beta end (the largest beta: left)")
    for axes in (left, right):
        axes.axhline(reference(rows)["gold"], color="black", lw=0.8, ls=":")
        axes.set_xlabel("√KL(π ‖ ref) of a response, √nats")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper right")
    left.set_ylabel("gold")
    return figure


def draw_paths(axes: Axes, arms: list[dict], color: str, marker: str, label: str | None) -> None:
    """The path of each arm, and a marker where it ends. label: of the first one."""
    for row in arms:
        curves, final = row["curves"], row["final"]
        x = [math.sqrt(max(kl, 0)) for kl in curves["kl_pi_ref_sequence"]]
        axes.plot(x, curves["gold"], color=color, lw=0.8, alpha=0.5)
        axes.plot(
            math.sqrt(final["kl_pi_ref_sequence"]),
            final["gold"],
            marker,
            ms=6,
            color=color,
            label=label,
            mec="white",
            mew=0.6,
        )
        label = None


def which_knob(rows: list[dict]) -> Figure:
    """Both KLs over time: the geometric mean of the seeds, and each seed as a thin line."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, epochs in zip(grid.T, ("4", "16"), strict=True):
        for axes, curve in zip(column, ("kl_pi_ref_sequence", "kl_old_pi"), strict=True):
            for corner in CORNERS:
                lines(axes, [r["curves"][curve] for r in group(rows, epochs, corner)], corner)
            axes.set_yscale("log")
        column[0].set_title(f"{epochs} epochs on each rollout", weight="bold")
        column[1].set_xlabel("rollout")
    grid[0, 0].set_ylim(0.2, 400)
    grid[0, 0].set_ylabel("KL(π ‖ ref)\nnats per response")
    grid[1, 0].set_ylabel("KL(π_old ‖ π)\nnats per token")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def lines(axes: Axes, curves: list[list[float]], corner: str) -> None:
    """One thin line for each seed, and a thick one for their geometric mean."""
    style, color = LINES[corner], COLORS[corner]
    floored = [[max(y, FLOOR) for y in curve] for curve in curves]
    for curve in floored:
        axes.plot(range(1, 1 + len(curve)), curve, style, color=color, lw=0.6, alpha=0.6)
    if floored:
        mean = [statistics.geometric_mean(values) for values in zip(*floored, strict=True)]
        steps = range(1, 1 + len(mean))
        axes.plot(steps, mean, style, color=color, lw=2, label=NAMES[corner])


def samples(rows: list[dict], seed: int = 1, shown: int = 3) -> Figure:
    """Responses of the base, and of the policies in the four corners."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    grid = figure.subplot_mosaic(
        [["before", "before"], ["neither", "clip"], ["kl", "both"]], height_ratios=[2, 3, 3]
    )
    first = next(row for row in rows if row["group"] == "reference")
    write(grid["before"], "before: the base", "black", first, shown, width=129)
    for corner in CORNERS:
        row = next((r for r in group(rows, "16", corner) if r["seed"] == seed), None)
        if row is not None:
            write(grid[corner], f"after: {NAMES[corner]}", COLORS[corner], row, shown, width=64)
    figure.text(
        0.5,
        -0.02,
        "bold: a kind word inside a complete sentence     black: in a complete sentence     "
        "grey: in none",
        ha="center",
        fontsize=8,
    )
    return figure


def write(axes: Axes, title: str, color: str, row: dict, shown: int, width: int) -> None:
    """Write responses in a fixed-width font, each word in the colour of what it is worth."""
    axes.set(xlim=(0, width), xticks=[], yticks=[])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set(visible=True, color=color, lw=1.2)
    numbers = (f"{name} {row['final'][name]:.2g}" for name in ("proxy", "gold", "valid"))
    axes.set_title(title, color=color, weight="bold", loc="left")
    axes.set_title("   ".join(numbers), loc="right", fontsize=9)
    lines = [line for response in row["samples"][:shown] for line in wrapped(response, width - 2)]
    axes.set_ylim(len(lines) + 0.2, -0.7)
    for y, (words, inside) in enumerate(lines):
        x = 1
        for word, in_sentence in zip(words, inside, strict=True):
            style = {
                "color": "black" if in_sentence else "0.6",
                "weight": "bold" if in_sentence and word in KIND else "normal",
            }
            axes.text(x, y, word, family="monospace", fontsize=8.2, va="center", **style)
            x += len(word) + 1


def wrapped(response: str, width: int) -> Iterator[tuple[list[str], list[bool]]]:
    """At most two lines of a response: their words, and whether each is in a complete sentence."""
    words = response.split() or ["(nothing)"]
    inside = [False] * len(words)
    for match in SENTENCE.finditer("".join(LETTER.get(word, "?") for word in words)):
        for i in range(*match.span()):
            inside[i] = True
    start = 0
    for line in textwrap.wrap(" ".join(words), width, max_lines=2, placeholder=" …"):
        line_words = line.split()
        marks = inside[start : start + len(line_words)]
        marks += [False] * (len(line_words) - len(marks))  # the placeholder is no word
        yield line_words, marks
        start += len(line_words)


def main(argv: list[str]) -> None:
    """Write every picture."""
    rows = results(argv)
    with matplotlib.rc_context(STYLE):
        figures = {
            "setting": setting.draw(),
            "simplex": simplex.draw(),
            "corners": corners_over_time(rows),
            "goodhart": goodhart(rows),
            "knobs": which_knob(rows),
            "samples": samples(rows),
        }
        for name, figure in figures.items():
            path = DOCS / f"question-{name}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
