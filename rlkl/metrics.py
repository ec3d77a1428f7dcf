"""What a step looks like in numbers, beside the meters of its updates."""

from __future__ import annotations

import resource
import sys
from itertools import pairwise

import torch
from torch import Tensor

from rlkl.types import Batch


def describe(batch: Batch, scores: Tensor, named: dict[str, Tensor], group_size: int) -> dict[str, float]:
    """The whole rollout: rewards and lengths."""
    groups = scores.view(-1, group_size)
    row = {
        "reward": scores.mean(),
        "reward_std": scores.std(unbiased=False),
        "unanimous": (groups.amax(1) == groups.amin(1)).float().mean(),
        "length": batch.mask.sum(1).float().mean(),
        "truncated": batch.truncated.float().mean(),
        "tokens": batch.mask.sum(),
    }
    row |= {f"reward/{name}": part.float().mean() for name, part in named.items()}
    return {name: float(x) for name, x in row.items()}


def credited(batch: Batch) -> dict[str, float]:
    """What is learned from: advantages, and how much of the returns the critic explains."""
    inside = batch.advantages[batch.mask]
    row = {"advantage": inside.mean(), "advantage_std": inside.std(unbiased=False)}
    if batch.returns is not None and batch.values is not None:
        returns, values = batch.returns[batch.mask], batch.values[batch.mask]
        row["explained_variance"] = 1 - (returns - values).var() / returns.var().clamp_min(1e-8)
    return {name: float(x) for name, x in row.items()}


def speed(tokens: float, clock: list[float], device: torch.device) -> dict[str, float]:
    """Seconds of the phases act, evaluate, learn; sampled tokens per second of the whole step; peak memory in GB."""
    act, evaluate, learn = (end - start for start, end in pairwise(clock))
    seconds = clock[-1] - clock[0]
    return {
        "seconds": seconds,
        "seconds_act": act,
        "seconds_evaluate": evaluate,
        "seconds_learn": learn,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gb": peak_memory(device) / 1e9,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
