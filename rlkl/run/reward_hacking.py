"""Detect reward hacking: the reward rises while held-out metrics fall.

This is over-optimisation (Gao et al. 2022, arXiv:2210.10760): what the reward is a proxy for, its
gold standard, rises with the reward at first and then falls. Everything here reads the rows of
metrics.jsonl, so a finished run can be examined in the same way. docs/hacking.md explains it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

# How many standard errors a change must have. To raise a suspicion it is many, because that is
# tested after every step. To clear one, by a held-out metric that has risen, it is fewer.
SUSPECT_ERRORS = 4.0
CLEAR_ERRORS = 2.0

# A metric has fallen only if it lost this share of its scale. In the experiment of
# docs/question-results.md no healthy run lost half as much.
MIN_LOSS = 0.25

# For ref_logprob it is nats: tokens half as likely under the reference as at its best. In that
# experiment the median hacked run lost more than 4.
MIN_LOGPROB_LOSS = math.log(2)

WINDOW = 10  # the last rows whose mean is the present value, at most
QUIET = 20  # steps without suspicion after which a new one is reported


class MetricTrend(NamedTuple):
    """How a metric has changed: its first value, its best, and its present one."""

    name: str
    start: float  # the first row
    best: float  # the highest mean of two rows in a row, before the last few
    best_step: int
    now: float  # the mean of the last few rows
    min_gain: float  # a change by more than this is a rise
    min_loss: float  # and by more than this a fall

    @property
    def fallen(self) -> bool:
        """Is it below its best?"""
        return self.best - self.now > self.min_loss

    @property
    def risen(self) -> bool:
        """Is it above its start, and not below its best?"""
        return self.now - self.start > self.min_gain and not self.fallen


def suspicion(rows: Sequence[dict[str, Any]], before: dict[str, float]) -> str | None:
    """One line that says what fell while the reward rose, and from where to where.

    None where nothing fell, or where a held-out metric rose too. The held-out metrics are eval/*
    in the rows, and `before`, measured before the first step: accuracy and the task's own grades.
    """
    rows = [{"step": 0} | {f"eval/{name}": x for name, x in before.items()}, *rows]
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval/"))
    heldout = [trend(rows, name, CLEAR_ERRORS) for name in names]
    reward = trend(rows, "reward", SUSPECT_ERRORS)
    if not reward.risen or any(metric.risen for metric in heldout):
        return None
    others = [trend(rows, name, SUSPECT_ERRORS) for name in ("ref_logprob", "distinct_2")]
    falls = [
        f"{t.name} {t.best:.3g} → {t.now:.3g} (since step {t.best_step})"
        for t in (*heldout, *others)
        if t.fallen
    ]
    if not falls:
        return None
    return f"reward {reward.start:.3g} → {reward.now:.3g}, but {', '.join(falls)}"


def trend(rows: Sequence[dict[str, Any]], name: str, errors: float) -> MetricTrend:
    """The trend of a metric over the rows that have it, with a finite value.

    errors: standard errors that count as a rise. A fall takes SUSPECT_ERRORS, and MIN_LOSS or
    MIN_LOGPROB_LOSS. With fewer than four rows the noise is not known: every rise counts as one,
    and nothing has fallen.
    """
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    points = points or [(0, 0.0)]
    values = [x for _, x in points]
    if len(values) < 4:
        last_step, last_value = points[-1]
        return MetricTrend(name, values[0], last_value, last_step, last_value, 0.0, 0.0)
    window = min(max(len(values) // 5, 2), WINDOW)
    pair_means = [(a + b) / 2 for a, b in pairwise(values[:-window])]
    best = max(pair_means)
    error = noise(values) * math.sqrt(1 + 1 / window)
    scale = max(abs(best), best - values[0])
    min_loss = MIN_LOGPROB_LOSS if name == "ref_logprob" else MIN_LOSS * scale
    # A few rows may have less scatter than the metric has.
    few_rows = 1 + 2 / (len(values) - 2)
    return MetricTrend(
        name,
        start=values[0],
        best=best,
        best_step=points[pair_means.index(best)][0],
        now=fmean(values[-window:]),
        min_gain=errors * error,
        min_loss=max(min_loss, SUSPECT_ERRORS * error * few_rows),
    )


def noise(values: Sequence[float]) -> float:
    """The standard deviation around a smooth curve: each value against the mean of its neighbours.

    Gasser, Sroka & Jennen-Steinmetz 1986 (Biometrika 73), with absolute values instead of squares,
    so that a jump hardly counts as noise. That difference has 3/2 of a value's variance, and
    E|x| = σ √(2/π) for a normal x.
    """
    triples = zip(values, values[1:], values[2:], strict=False)
    differences = [abs(b - (a + c) / 2) for a, b, c in triples]
    return fmean(differences) * math.sqrt(math.pi / 2 / 1.5)


def is_news(rows: Sequence[dict[str, Any]]) -> bool:
    """Is the last row the first suspicious one after at least QUIET steps?"""
    return bool(rows[-1].get("reward_hacking")) and not any(
        row.get("reward_hacking") for row in rows[-1 - QUIET : -1]
    )


def episodes(rows: Sequence[dict[str, Any]], before: dict[str, float]) -> list[str]:
    """One line per episode of suspicion: its steps, and what had fallen by its end.

    An episode begins with a row that is news, and ends with the last suspicious one before the
    next news.
    """
    ends: list[list[int]] = []  # [first, last] row of each episode, counted from 1
    for n, row in enumerate(rows, 1):
        if is_news(rows[:n]):
            ends.append([n, n])
        elif row.get("reward_hacking"):
            ends[-1][1] = n
    lines = []
    for first, last in ends:
        steps = f"steps {rows[first - 1]['step']} to {rows[last - 1]['step']}"
        lines.append(f"{steps}: {suspicion(rows[:last], before)}")
    return lines
