"""The figure of the README: python -m benchmarks.figure RUN [RUN ...] writes docs/tiny.png."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure

from rlkl.run.log import read_rows


class Panel(NamedTuple):
    """One pair of axes: its title, its unit, and {metric: matplotlib's line style}."""

    title: str
    unit: str
    styles: dict[str, str]


PANELS = (
    Panel(
        "held-out accuracy (dots) and reward",
        "share of right responses",
        {"eval/accuracy": "o", "reward": "-"},
    ),
    Panel(
        "how far from the reference, and from pi_old",
        "nats per token",
        {"kl_pi_ref_token": "-", "kl_old_pi": ":"},
    ),
)


def main(folders: list[str]) -> None:
    """Draw the metrics of these run folders, one colour for each run."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2), PANELS, strict=True):
        for number, folder in enumerate(folders):
            name = run_name(Path(folder))
            rows = rows_and_ends(Path(folder))
            for metric, style in panel.styles.items():
                steps = [row["step"] for row in rows if metric in row]
                values = [row[metric] for row in rows if metric in row]
                label = None if style == "o" else f"{name}: {metric}"
                axes.plot(steps, values, style, color=f"C{number}", label=label, linewidth=1.2)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(panel.unit, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig("docs/tiny.png", dpi=110)


def rows_and_ends(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each step, between the held-out accuracy before training and after it."""
    rows = read_rows(folder / "metrics.jsonl")
    heldout = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))
    before, after = (heldout[when]["accuracy"] for when in ("before", "after"))
    first = {"step": 0, "eval/accuracy": before}
    return [first, *rows, {"step": rows[-1]["step"], "eval/accuracy": after}]


def run_name(folder: Path) -> str:
    """PPO or GRPO, by the advantage estimator, as both have the same loss; else its name."""
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    advantage = yaml.safe_load(text)["advantage"]["name"]
    return {"gae": "PPO", "grpo": "GRPO"}.get(advantage, advantage)


if __name__ == "__main__":
    main(sys.argv[1:])
