"""Pages and figures about finished runs, one or several, made from the files in their folders.

The figures need matplotlib, which is imported only where one is drawn. Without it the pages are
written all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from rlkl.run import reward_hacking
from rlkl.run.terminal import note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Panel(NamedTuple):
    """A small panel of a run's figure."""

    title: str
    lines: dict[str, str]  # metric → its name in the legend
    log: bool = False  # a logarithmic axis: what is not positive is not drawn


ZERO_VARIANCE = Panel(
    "prompts whose responses all score the same, share",
    {"frac_reward_zero_std": "share of prompts"},
)
EXPLAINED_VARIANCE = Panel(
    "explained variance: 1 = the critic predicts the returns",
    {"explained_variance": "explained variance"},
)
PANELS = (
    Panel(
        "reward and held-out accuracy",
        {"reward": "reward on training prompts", "eval/accuracy": "held-out accuracy"},
    ),
    Panel(
        "the two KLs, nats per token",
        {
            "kl_pi_ref_token": "KL(pi ‖ ref): from the frozen model of the start",
            "kl_old_pi": "KL(pi_old ‖ pi): from the policy that sampled",
        },
        log=True,
    ),
    Panel("entropy, nats per token", {"entropy": "entropy"}),
    ZERO_VARIANCE,  # of a run with a critic EXPLAINED_VARIANCE
    Panel(
        "gradient norm, before clipping",
        {"grad_norm/policy": "policy", "grad_norm/critic": "critic"},
    ),
    Panel("response length, tokens", {"response_length": "response length"}),
)
WINDOW = 10  # steps that a number of the pages is averaged over: a single step is noisy
TABLE = (  # the metrics that the page shows
    "reward",
    "frac_reward_zero_std",
    "response_length",
    "truncated_fraction",
    "entropy",
    "clip_fraction",
    "ratio_max",
    "kl_pi_ref_token",
    "kl_pi_ref_sequence",
    "ref_logprob",
    "distinct_2",
    "kl_old_pi",
    "sampler_gap",
    "explained_variance",
    "grad_norm/policy",
    "grad_norm/critic",
    "tokens_per_second",
)
COMPARED = {  # metric → title; each is a row of panels
    "reward": "reward",
    "eval/accuracy": "held-out accuracy",
}
FIRST_SAMPLES, LAST_SAMPLES = 4, 8  # samples that the page shows


class RunSummary(NamedTuple):
    """A run, as `rlkl report` compares it with others."""

    name: str
    options: dict[str, Any]  # by dotted key
    rows: list[dict[str, Any]]  # of metrics.jsonl
    before: dict[str, float]  # held out; empty where it is not known
    after: dict[str, float]  # held out; empty before the end
    best: tuple[float, int] | None  # the best held-out accuracy, and its step


# ------------------------------------------------------------------ one run


def write(
    folder: Path, rows: list[dict], before: dict[str, float], after: dict[str, float]
) -> None:
    """Write report.md and heldout.json, and with matplotlib metrics.png into the run folder."""
    heldout = json.dumps({"before": before, "after": after}, indent=1)
    (folder / "heldout.json").write_text(heldout, encoding="utf-8")
    figure = draw(rows, before, after)
    if figure is not None:
        figure.savefig(folder / "metrics.png", dpi=110)
    page = run_page(folder, rows, before, after, has_figure=figure is not None)
    (folder / "report.md").write_text("\n".join(page), encoding="utf-8")


def run_page(
    folder: Path,
    rows: list[dict],
    before: dict[str, float],
    after: dict[str, float],
    *,
    has_figure: bool,
) -> list[str]:
    """The lines of report.md."""
    command = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["command"]
    seconds = sum(row["seconds"] for row in rows)
    episodes = reward_hacking.episodes(rows, before)
    heldout = [[name, f"{before[name]:.3f}", f"{after[name]:.3f}"] for name in after]
    first, last = first_and_last(rows)
    names = [name for name in TABLE if any(name in row for row in rows)]
    metrics = [[name, average(first, name), average(last, name)] for name in names]
    head = ["metric, mean of", steps_in(first, "first"), steps_in(last, "last")]
    samples = [row["sample"] | {"step": row["step"]} for row in rows if "sample" in row]
    samples = samples[:FIRST_SAMPLES] + samples[FIRST_SAMPLES:][-LAST_SAMPLES:]
    return [
        f"# {folder.name}",
        "",
        f"    {command}",
        "",
        f"{len(rows)} steps, {seconds:.0f} s.",
        *(f"\n**Reward hacking?** {episode}" for episode in episodes),
        "",
        *table(["held out", "before", "after"], heldout),
        *(["![metrics](metrics.png)", ""] if has_figure else []),
        *table(head, metrics),
        *table(["step", "prompt", "response", "score"], map(sample_row, samples)),
    ]


def sample_row(sample: dict) -> list[str]:
    """Step, prompt, response and score: the cells of one row."""
    texts = (str(sample[name]).replace("\n", " ")[:200] for name in ("prompt", "response"))
    score = "-" if sample["score"] is None else f"{sample['score']:.3g}"
    return [str(sample["step"]), *(f"`{text}`" for text in texts), score]


def first_and_last(rows: Sequence[dict]) -> tuple[Sequence[dict], Sequence[dict]]:
    """The first WINDOW rows and the last: fewer where they would overlap, and no row is in both."""
    count = max(min(WINDOW, len(rows) // 2), 1)
    return rows[:count], rows[count:][-count:]


def steps_in(rows: Sequence[dict], which: str) -> str:
    """Such as `the last 10 steps`; `-` of none."""
    if not rows:
        return "-"
    return f"the {which} step" if len(rows) == 1 else f"the {which} {len(rows)} steps"


def average(rows: Sequence[dict], name: str, form: str = ".4g") -> str:
    """The mean of a metric over the rows that have it, or `-`."""
    values = [row[name] for row in rows if name in row]
    return f"{fmean(values):{form}}" if values else "-"


# ------------------------------------------------------------------ several runs


def compare(folder: Path, runs: Sequence[RunSummary]) -> list[Path]:
    """Write report-compare.md, and with matplotlib report-compare.png. Returns what was written."""
    page_path, figure_path = folder / "report-compare.md", folder / "report-compare.png"
    figure = draw_comparison(runs)
    if figure is not None:
        figure.savefig(figure_path, dpi=110)
    head, *body = comparison(runs)
    page = [
        f"# {' and '.join(run.name for run in runs)}",
        "",
        *table(head, body),
        *(["![runs](report-compare.png)", ""] if figure is not None else []),
    ]
    page_path.write_text("\n".join(page), encoding="utf-8")
    return [page_path] if figure is None else [page_path, figure_path]


def comparison(runs: Sequence[RunSummary]) -> list[list[str]]:
    """The cells of a table with a column for each run: the options that differ, and the results."""
    lines = [["", *(run.name for run in runs)], *differing_options(runs)]

    def add(name: str, cells: Iterable[str]) -> None:
        lines.append([name, *cells])

    add("steps", (f"{run.rows[-1]['step']} of {run.options['optim.steps']}" for run in runs))
    for name in dict.fromkeys(name for run in runs for name in {**run.before, **run.after}):
        changes = (f"{cell(run.before, name)} → {cell(run.after, name)}" for run in runs)
        add(f"held out: {name}", changes)
    best = (f"{run.best[0]:.3f} at step {run.best[1]}" if run.best else "-" for run in runs)
    add("held out: best accuracy", best)
    ends = (first_and_last(run.rows) for run in runs)
    rewards = (" → ".join(average(end, "reward", ".3f") for end in both) for both in ends)
    add(f"reward, first → last {WINDOW} steps", rewards)
    seconds = [sum(row["seconds"] for row in run.rows) for run in runs]
    tokens = [sum(row["tokens"] for row in run.rows) for run in runs]
    add("seconds in steps", (f"{s:.1f}" for s in seconds))
    add("tokens a second", (f"{n / s:.0f}" for n, s in zip(tokens, seconds, strict=True)))
    peaks = (max(row["peak_memory_gb"] for row in run.rows) for run in runs)
    add("peak memory, GB", (f"{peak:.2f}" for peak in peaks))
    return lines


def differing_options(runs: Sequence[RunSummary]) -> list[list[str]]:
    """The option and its value in each run, where these are not all equal."""
    lines = []
    for key in dict.fromkeys(key for run in runs for key in run.options):
        values = [run.options.get(key) for run in runs]
        if any(value != values[0] for value in values):
            lines.append([key, *("-" if value is None else str(value) for value in values)])
    return lines


def cell(numbers: dict[str, float], name: str) -> str:
    return f"{numbers[name]:.3f}" if name in numbers else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, and an empty line after it."""
    lines = [head, ["---"] * len(head)]
    lines += [[text.replace("|", "\\|") for text in row] for row in rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


# ------------------------------------------------------------------ figures


def new_figure(width: float, height: float) -> Figure | None:
    """An empty figure, inches; None without matplotlib, with a note that says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        note("there is no figure, as matplotlib is not installed: pip install 'rlkl[plots]'")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def draw(
    rows: Sequence[dict],
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
) -> Figure | None:
    """Six small panels of metrics over the steps so far. None without matplotlib.

    rows: of metrics.jsonl. before, after: the held-out numbers before the first step and after the
    last one, where they are known. A notebook may call this again and again.
    """
    figure = new_figure(13, 6.5)
    if figure is None:
        return None
    has_critic = any("explained_variance" in row for row in rows)
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        if has_critic and panel is ZERO_VARIANCE:  # equal scores have a signal there
            panel = EXPLAINED_VARIANCE
        lines = {}
        for metric, label in panel.lines.items():
            points = curve(rows, metric, before or {}, after or {})
            lines[label] = [(step, x) for step, _, x in points if x > 0 or not panel.log]
        draw_panel(axes, panel.title, "step", lines)
        if panel.log and any(lines.values()):
            axes.set_yscale("log")
    return figure


def draw_comparison(runs: Sequence[RunSummary]) -> Figure | None:
    """Reward and held-out accuracy, a line for each run, over steps and over the seconds in them.

    None without matplotlib.
    """
    figure = new_figure(10, 6)
    if figure is None:
        return None
    rows_of_panels = zip(figure.subplots(2, 2), COMPARED.items(), strict=True)
    for (over_steps, over_seconds), (metric, title) in rows_of_panels:
        curves = {r.name: curve(r.rows, metric, r.before, r.after) for r in runs}
        by_step = {name: [(p[0], p[2]) for p in points] for name, points in curves.items()}
        by_seconds = {name: [(p[1], p[2]) for p in points] for name, points in curves.items()}
        draw_panel(over_steps, title, "step", by_step)
        draw_panel(over_seconds, title, "seconds in steps", by_seconds)
    return figure


def curve(
    rows: Sequence[dict], metric: str, before: Mapping[str, float], after: Mapping[str, float]
) -> list[tuple[int, float, float]]:
    """(step, seconds in steps until then, value) of each row that has the metric.

    A held-out metric also has its values before the first step and after the last one.
    """
    elapsed = accumulate(row["seconds"] for row in rows)
    seconds = {0: 0.0} | {row["step"]: s for row, s in zip(rows, elapsed, strict=True)}
    values = {row["step"]: row[metric] for row in rows if metric in row}
    for step, numbers in ((0, before), (max(seconds), after)):
        for name, x in numbers.items():
            if f"eval/{name}" == metric:
                values[step] = x
    return [(step, seconds[step], values[step]) for step in sorted(values)]


def draw_panel(
    axes: Axes, title: str, x_label: str, lines: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """One line for each name: a mark on each point where they are few, else also a running mean."""
    for number, (label, points) in enumerate(lines.items()):
        if not points:
            continue
        color = f"C{number}"
        xs = [x for x, _ in points]
        ys = [y for _, y in points]
        if len(points) < 3 * WINDOW:
            axes.plot(xs, ys, color=color, label=label, marker="o", markersize=4)
        else:
            axes.plot(xs, ys, color=color, alpha=0.3, linewidth=1)
            axes.plot(xs, running_mean(ys), color=color, label=label)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if sum(map(bool, lines.values())) > 1:
        axes.legend(fontsize=8)


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, as many on either side: it does not lag behind."""
    means = []
    for i in range(len(values)):
        reach = min(WINDOW // 2, i, len(values) - 1 - i)
        means.append(fmean(values[i - reach : i + reach + 1]))
    return means
