"""What runs show at their end, alone and side by side: figures and pages, made from the files in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlkl import hacking

PANELS = {  # title → metrics drawn in it
    "reward and held-out accuracy": ("reward", "heldout/accuracy"),
    "KL per token, nats": ("kl_pi_ref_tok", "kl_old_pi"),
    "entropy, nats": ("entropy",),
    "reply length, tokens": ("length",),
}
SHOWN = ("reward", "unanimous", "length", "truncated", "entropy", "clip_fraction", "ratio_max", "kl_pi_ref_tok",
    "kl_pi_ref_seq", "ref_logprob", "distinct", "kl_old_pi", "sampler_gap", "explained_variance", "grad_norm/policy",
    "grad_norm/critic", "tokens_per_second")
COMPARED = {"reward": "reward", "heldout/accuracy": "held-out accuracy"}  # metric → its name, a row of panels each


class Told(NamedTuple):
    """What a run's folder says of it."""

    name: str
    options: dict[str, Any]  # by dotted key
    rows: list[dict[str, Any]]  # of metrics.jsonl
    before: dict[str, float]  # held out; empty where it is not known
    after: dict[str, float]  # empty before the end
    best: tuple[float, int] | None  # held-out accuracy, and the step it was reached at


def write(folder: Path, rows: list[dict], before: dict[str, float], after: dict[str, float]) -> None:
    """Draw the curves and write the page and the held-out numbers into the run folder."""
    draw(rows).savefig(folder / "metrics.png", dpi=110)
    (folder / "heldout.json").write_text(json.dumps({"before": before, "after": after}, indent=1), encoding="utf-8")
    first, last = rows[0], rows[-1]
    command = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["command"]
    measured = [[name, f"{first[name]:.4g}", f"{last[name]:.4g}"] for name in SHOWN if name in first and name in last]
    samples = [row["sample"] | {"step": row["step"]} for row in rows if "sample" in row]
    samples = samples[:4] + samples[4:][-8:]
    page = [
        f"# {folder.name}",
        "",
        f"    {command}",
        "",
        f"{len(rows)} steps, {sum(r['seconds'] for r in rows):.0f} s.",
        *(f"\n**Reward hacking?** {episode}" for episode in hacking.episodes(rows, before)),
        "",
        *table(["held out", "before", "after"], ([n, f"{before[n]:.3f}", f"{after[n]:.3f}"] for n in after)),
        "![metrics](metrics.png)",
        "",
        *table(["metric", "first step", "last step"], measured),
        *table(["step", "prompt", "reply", "score"], map(sample_row, samples)),
    ]
    (folder / "report.md").write_text("\n".join(page), encoding="utf-8")


def compare(folder: Path, runs: Sequence[Told]) -> None:
    """The figure and the page about several runs, into a folder."""
    draw_together(runs).savefig(folder / "report-compare.png", dpi=110)
    head, *body = together(runs)
    page = [f"# {' and '.join(run.name for run in runs)}", "", *table(head, body), "![runs](report-compare.png)", ""]
    (folder / "report-compare.md").write_text("\n".join(page), encoding="utf-8")


def together(runs: Sequence[Told]) -> list[list[str]]:
    """The table of several runs, a column each: the options in which they differ, and what came of it."""
    lines = [["", *(run.name for run in runs)]]
    for key in dict.fromkeys(key for run in runs for key in run.options):
        values = [run.options.get(key) for run in runs]
        if any(value != values[0] for value in values):
            lines.append([key, *("-" if value is None else str(value) for value in values)])
    lines.append(["steps", *(f"{run.rows[-1]['step']} of {run.options['optim.steps']}" for run in runs)])
    for name in dict.fromkeys(name for run in runs for name in {**run.before, **run.after}):
        lines.append([f"held out: {name}", *(f"{shown(run.before, name)} → {shown(run.after, name)}" for run in runs)])
    best = (f"{run.best[0]:.3f} at step {run.best[1]}" if run.best else "-" for run in runs)
    lines.append(["held out: best accuracy", *best])
    lines.append(["reward, first → last step", *(f"{r.rows[0]['reward']:.3f} → {r.rows[-1]['reward']:.3f}"
                                                 for r in runs)])
    seconds = [sum(row["seconds"] for row in run.rows) for run in runs]
    tokens = [sum(row["tokens"] for row in run.rows) for run in runs]
    lines.append(["seconds in steps", *(f"{s:.1f}" for s in seconds)])
    lines.append(["tokens a second", *(f"{n / s:.0f}" for n, s in zip(tokens, seconds, strict=True))])
    lines.append(["peak memory, GB", *(f"{max(row['peak_memory_gb'] for row in run.rows):.2f}" for run in runs)])
    return lines


def shown(numbers: dict[str, float], name: str) -> str:
    return f"{numbers[name]:.3f}" if name in numbers else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, and an empty one behind it."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def sample_row(sample: dict) -> list[str]:
    prompt, reply = (str(sample[k]).replace("\n", " ")[:200] for k in ("prompt", "reply"))
    return [str(sample["step"]), f"`{prompt}`", f"`{reply}`", f"{sample['score']:.3g}"]


def draw(rows: list[dict]) -> Figure:
    """Four small panels over the steps."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        panel(axes, title, "step", {name: [(row["step"], row[name]) for row in rows if name in row] for name in names})
    return figure


def draw_together(runs: Sequence[Told]) -> Figure:
    """Reward and held-out accuracy, over the steps and over the seconds spent in them: a line a run."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for (left, right), (metric, title) in zip(figure.subplots(2, 2), COMPARED.items(), strict=True):
        curves = {run.name: curve(run, metric) for run in runs}
        for axes, place, below in ((left, 0, "step"), (right, 1, "seconds in steps")):
            panel(axes, title, below, {name: [(p[place], p[2]) for p in points] for name, points in curves.items()})
    return figure


def curve(run: Told, metric: str) -> list[tuple[int, float, float]]:
    """(step, seconds in steps until then, value) where a metric was measured; held out also before and after."""
    spent = {0: 0.0} | dict(zip((r["step"] for r in run.rows), accumulate(r["seconds"] for r in run.rows), strict=True))
    values = {row["step"]: row[metric] for row in run.rows if metric in row}
    held = {0: run.before, run.rows[-1]["step"]: run.after}
    values |= {step: x for step, numbers in held.items() for name, x in numbers.items() if f"heldout/{name}" == metric}
    return [(step, spent[step], values[step]) for step in sorted(values)]


def panel(axes: Axes, title: str, below: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    """A line of points for each name; `below`: what the x axis is."""
    for label, points in lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None, markersize=4)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(below, fontsize=8)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
