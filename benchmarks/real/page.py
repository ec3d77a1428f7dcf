"""The tables of docs/real.md and of the README, from benchmarks/results/real.json."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.pages import table

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "real.md", ROOT / "README.md"]
TITLES = {
    "grpo-0": ("GRPO", "0"),
    "grpo-1": ("GRPO", "1"),
    "grpo-2": ("GRPO", "2"),
    "ppo": ("PPO", "0"),
    "grpo-shuffled": ("GRPO, advantages shuffled", "0"),
}
COLUMNS = {"accuracy": "sampled accuracy, held out", "greedy": "greedy", "pass@8": "pass@8"}
LAST = 4  # steps whose mean is the end of a curve


def sections(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the pages, by the name of their marker."""
    rows = {row["name"]: row for row in results["rows"]}
    replies = [row for row in results["rows"] if row["config"] == "real-replies"]
    return {
        "real": learned(rows),
        "real-samples": samples(rows["grpo-0"]),
        "real-replies": samples(*replies),
        "real-kl": kl(*replies),
        "real-report": table(results["report"][0], results["report"][1:]),
    }


def learned(rows: dict[str, Any]) -> str:
    """What each run on the sentiment of reviews has learned."""
    lines = []
    for name, title in TITLES.items():
        found = rows[name]["found"]
        changes = ["{:.3f} → {:.3f}".format(*found[column]) for column in COLUMNS]
        lines.append([*title, *changes, f"{rows[name]['minutes']:.1f}"])
    return table(["", "seed", *COLUMNS.values(), "minutes"], lines)


def samples(*rows: dict[str, Any]) -> str:
    """Held-out prompts, and the responses before training and after each of these runs."""
    lines = []
    for same_prompt in zip(*(row["samples"] for row in rows), strict=True):
        first = same_prompt[0]
        texts = [first["prompt"], first["before"], *(sample["after"] for sample in same_prompt)]
        lines.append([quoted(text) for text in texts])
    after = ["after"] if len(rows) == 1 else [f"after {row['name']}" for row in rows]
    return table(["held-out prompt", "before", *after], lines)


def quoted(text: str) -> str:
    """A text as code in a cell of a table."""
    plain = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return f"`{plain}`" if plain else "(empty)"


def kl(*rows: dict[str, Any]) -> str:
    """A column for each run: how its metrics change from the first step to the last ones."""
    metrics = {
        "reward": "reward: share of polite words",
        "response_length": "tokens of a response",
        "entropy": "entropy, nats a token",
        "ref_logprob": "log-prob of a token under the reference, nats",
        "kl_pi_ref_sequence": "KL(pi ‖ ref), nats a response",
    }
    lines = []
    for name, title in metrics.items():
        curves = [row["curves"][name] for row in rows]
        lines.append([title, *(f"{c[0]:.3g} → {fmean(c[-LAST:]):.3g}" for c in curves)])
    gold = ["{:.3f} → {:.3f}".format(*row["found"]["accuracy"]) for row in rows]
    lines.append(["held out: a sentence that fits the review", *gold])
    warnings = [row["hacking"][0] if row["hacking"] else "none" for row in rows]
    lines.append(["warning of reward hacking", *warnings])
    return table(["", *(row["name"] for row in rows)], lines)
