"""What a run shows at its end: metrics.png and report.md, made from metrics.jsonl alone."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from rlkl import hacking

matplotlib.use("agg")

PANELS = {  # title → metrics drawn in it
    "reward and held-out accuracy": ("reward", "heldout/accuracy"),
    "KL per token, nats": ("kl_pi_ref_tok", "kl_old_pi"),
    "entropy, nats": ("entropy",),
    "reply length, tokens": ("length",),
}
SHOWN = ("reward", "ref_logprob", "distinct", "unanimous", "length", "truncated", "entropy", "clip_fraction",
    "ratio_max", "kl_pi_ref_tok",
    "kl_pi_ref_seq", "kl_old_pi", "sampler_gap", "explained_variance", "grad_norm/policy", "grad_norm/critic",
    "tokens_per_second")


def write(folder: Path, rows: list[dict], before: dict[str, float], after: dict[str, float]) -> None:
    """Draw the curves and write the page into the run folder."""
    draw(rows).savefig(folder / "metrics.png", dpi=110)
    first, last = rows[0], rows[-1]
    command = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["command"]
    table = [f"| {name} | {first[name]:.4g} | {last[name]:.4g} |" for name in SHOWN if name in first and name in last]
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
        "| held out | before | after |",
        "|---|---|---|",
        *(f"| {name} | {before[name]:.3f} | {after[name]:.3f} |" for name in after),
        "",
        "![metrics](metrics.png)",
        "",
        "| metric | first step | last step |",
        "|---|---|---|",
        *table,
        "",
        "| step | prompt | reply | score |",
        "|---|---|---|---|",
        *map(sample_row, samples),
        "",
    ]
    (folder / "report.md").write_text("\n".join(page), encoding="utf-8")


def sample_row(sample: dict) -> str:
    prompt, reply = (str(sample[k]).replace("|", "\\|").replace("\n", " ")[:200] for k in ("prompt", "reply"))
    return f"| {sample['step']} | `{prompt}` | `{reply}` | {sample['score']:.3g} |"


def draw(rows: list[dict]) -> Figure:
    """Four small panels over the steps."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None, markersize=4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    return figure
