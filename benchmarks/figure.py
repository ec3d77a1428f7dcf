"""The figure of the README: python -m benchmarks.figure RUN [RUN ...] draws docs/tiny.png from run folders."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from rlkl.log import read_rows

PANELS = {  # title → unit, metrics, as dots where one is measured now and then
    "held-out accuracy (dots) and reward": ("share of right replies", ("heldout/accuracy", "reward")),
    "how far from the reference, and from pi_old": ("nats a token", ("kl_pi_ref_tok", "kl_old_pi")),
}


def main(folders: list[str]) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, (title, (unit, metrics)) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for color, folder in enumerate(folders):
            loss = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))["loss"]["name"]
            rows = read_rows(Path(folder) / "metrics.jsonl")
            for metric, style in zip(metrics, ("o", "-") if "heldout/accuracy" in metrics else ("-", ":"), strict=True):
                points = [(row["step"], row[metric]) for row in rows if metric in row]
                label = f"{loss}: {metric}" if style != "o" else None
                axes.plot(*zip(*points, strict=True), style, color=f"C{color}", label=label, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig("docs/tiny.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
