"""What a step looks like in numbers, beside the meters of its updates."""

from __future__ import annotations

import resource
import sys
from itertools import pairwise

import torch
from torch import Tensor

from rlkl.types import Batch

PHASES = ("act", "evaluate", "learn")


def describe(batch: Batch, scores: Tensor, named: dict[str, Tensor], group_size: int) -> dict[str, float]:
    """The whole rollout: rewards, lengths, repetition. A reply without a score, or a part of it, is NaN there."""
    highest, lowest = (scores.view(-1, group_size).nan_to_num(x) for x in (-torch.inf, torch.inf))
    row = {"reward": scores.nanmean(), "reward_std": (scores - scores.nanmean()).square().nanmean().sqrt(),
        "unanimous": (highest.amax(1) <= lowest.amin(1)).float().mean(), "length": batch.mask.sum(1).float().mean(),
        "truncated": batch.truncated.float().mean(), "tokens": batch.mask.sum(), "distinct": distinct(batch)}
    row |= {f"reward/{name}": part.nanmean() for name, part in named.items() if not part.isnan().all()}
    return {name: float(x) for name, x in row.items()}


def distinct(batch: Batch) -> Tensor:
    """The share of the bigrams of token ids that are new in their reply (after Li et al. 2016, arXiv:1510.03055).

    1 where there are none. Within replies, not across them: policies get surer of short answers without any harm.
    """
    ids, both = batch.response_ids, batch.mask[:, 1:] & batch.mask[:, :-1]
    pairs = (ids[:, :-1] * (ids.max() + 1) + ids[:, 1:]).masked_fill(~both, -1).sort(1).values
    return 1 - ((pairs[:, 1:] == pairs[:, :-1]) & (pairs[:, 1:] >= 0)).sum() / both.sum().clamp_min(1)


def credited(batch: Batch) -> dict[str, float]:
    """What is learned from: advantages, and how much of the returns the critic explains."""
    inside = batch.advantages[batch.mask]
    row = {"advantage": inside.mean(), "advantage_std": (inside - inside.mean()).square().mean().sqrt()}
    if len(inside) > 1 and batch.returns is not None and batch.values is not None:
        returns, values = batch.returns[batch.mask], batch.values[batch.mask]
        row["explained_variance"] = 1 - (returns - values).var() / returns.var().clamp_min(1e-8)
    return {name: float(x) for name, x in row.items()}


def speed(tokens: float, clock: list[float], device: torch.device) -> dict[str, float]:
    """Seconds of act, evaluate and learn; sampled tokens per second of the whole step; peak memory in GB.

    Memory is that of the device's allocator on CUDA, else of the process.
    """
    row = {"seconds": clock[-1] - clock[0]}
    row |= {f"seconds_{name}": b - a for name, (a, b) in zip(PHASES, pairwise(clock), strict=True)}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
    return row | {"tokens_per_second": tokens / row["seconds"], "peak_memory_gb": peak / 1e9}
