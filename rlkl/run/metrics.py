"""The metrics of a step: of its rollout, advantages and updates, and of the time they took.

docs/metrics.md explains each one, and what healthy looks like.
"""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlkl.rewards import nan_to_none
from rlkl.types import Batch, Rollout, nonzero_variance

PHASES = ("rollout", "logprobs", "update")  # of a training step


@dataclass
class Meters:
    """What the updates of a step add up: () tensors, by the name of a diagnostic."""

    tokens: int = 0
    sums: dict[str, Any] = field(default_factory=partial(defaultdict, float))  # over all tokens
    peaks: dict[str, list[Tensor]] = field(default_factory=partial(defaultdict, list))


def rollout_metrics(rollout: Rollout, group_size: int) -> dict[str, float]:
    """Rewards, lengths and repetition of all responses of a rollout.

    A response without a score, or without a part of it, is NaN there and is left out.
    """
    batch = rollout.responses
    scores = batch.scores
    metrics = {
        "reward": scores.nanmean(),
        "reward_std": (scores - scores.nanmean()).square().nanmean().sqrt(),
        "frac_reward_zero_std": (~nonzero_variance(scores, group_size)).float().mean(),
        "response_length": batch.mask.sum(1).float().mean(),
        "truncated_fraction": batch.truncated.float().mean(),
        "tokens": batch.mask.sum(),
        "distinct_2": distinct_2(batch),
    }
    for name, part in rollout.score_parts.items():
        if not part.isnan().all():
            metrics[f"rewards/{name}"] = part.nanmean()
    return {name: float(x) for name, x in metrics.items()} | rollout.metrics


def response_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """A row for each response of a rollout: prompt, response, score, its parts, length, truncated.

    The names are those of the metrics. A score that is missing is None.
    """
    batch = rollout.responses
    columns = {
        "prompt": [example.prompt for example in rollout.examples],
        "response": rollout.texts,
        "score": nan_to_none(batch.scores),  # JSON has no NaN
        **{f"rewards/{name}": nan_to_none(part) for name, part in rollout.score_parts.items()},
        "response_length": batch.mask.sum(1).tolist(),
        "truncated": batch.truncated.tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def distinct_2(batch: Batch) -> Tensor:
    """The share of bigrams of token ids that are new in their response (arXiv:1510.03055).

    1 where there are none. It falls when responses repeat themselves. Bigrams are not compared
    across responses: a policy may become sure of a short answer without any harm.
    """
    ids = batch.response_ids
    both = batch.mask[:, 1:] & batch.mask[:, :-1]
    bigrams = (ids[:, :-1] * (ids.max() + 1) + ids[:, 1:]).masked_fill(~both, -1)
    bigrams = bigrams.sort(1).values
    repeated = (bigrams[:, 1:] == bigrams[:, :-1]) & (bigrams[:, 1:] >= 0)
    return 1 - repeated.sum() / both.sum().clamp_min(1)


def advantage_metrics(batch: Batch) -> dict[str, float]:
    """Mean and std of the advantages; how much of the returns the critic explains."""
    inside = batch.advantages[batch.mask]
    centred = inside - inside.mean()
    metrics = {"advantage_mean": inside.mean(), "advantage_std": centred.square().mean().sqrt()}
    if len(inside) > 1 and batch.returns is not None and batch.values is not None:
        returns = batch.returns[batch.mask]
        unexplained = (returns - batch.values[batch.mask]).var()
        metrics["explained_variance"] = 1 - unexplained / returns.var().clamp_min(1e-8)
    return {name: float(x) for name, x in metrics.items()}


def update_metrics(meters: Meters, mask: Tensor) -> dict[str, float]:
    """Means over all tokens of a step's updates, however they were cut; `_max` is the largest.

    effective_sample_size: (mean ratio)² / mean ratio², 1 while pi is pi_old.
    kl_pi_ref_sequence: nats per response, the sum over its tokens.
    """
    if not meters.tokens:
        return {}
    row = {name: float(total) / meters.tokens for name, total in meters.sums.items()}
    row |= {name: float(torch.stack(peaks).max()) for name, peaks in meters.peaks.items()}
    row["effective_sample_size"] = row.pop("ratio_mean") ** 2 / row.pop("ratio_square")
    if "kl_pi_ref_token" in row:
        tokens, responses = int(mask.sum()), int(mask.any(1).sum())
        row["kl_pi_ref_sequence"] = row["kl_pi_ref_token"] * tokens / responses
    return row


def speed_metrics(tokens: float, clock: list[float], device: torch.device) -> dict[str, float]:
    """Seconds of a step and of its phases, tokens per second, and peak memory in GB.

    clock: the times at which the phases began, and the end. Tokens are sampled ones, seconds those
    of the whole step. Memory is that of the device's allocator on CUDA, else of the process.
    """
    seconds = clock[-1] - clock[0]
    phases = zip(PHASES, pairwise(clock), strict=True)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "seconds": seconds,
        **{f"seconds/{phase}": end - start for phase, (start, end) in phases},
        "tokens_per_second": tokens / seconds,
        "peak_memory_gb": peak / 1e9,
    }
