"""What a step looks like in numbers, beside the meters of its updates."""

from __future__ import annotations

import resource
import sys
from itertools import pairwise

import torch
from torch import Tensor

from rlkl.types import Batch


def describe(batch: Batch, scores: Tensor, named: dict[str, Tensor], group_size: int) -> dict[str, float]:
    """The rollout: rewards, lengths, advantages, and how much of the returns the critic explains."""
    groups, inside = scores.view(-1, group_size), batch.mask
    row = {
        "reward": scores.mean(),
        "reward_std": scores.std(unbiased=False),
        "unanimous": (groups.amax(1) == groups.amin(1)).float().mean(),
        "length": inside.sum(1).float().mean(),
        "truncated": batch.truncated.float().mean(),
        "advantage": batch.advantages[inside].mean(),
        "advantage_std": batch.advantages[inside].std(unbiased=False),
    }
    row |= {f"reward/{name}": part.float().mean() for name, part in named.items()}
    if batch.returns is not None and batch.values is not None:
        returns, values = batch.returns[inside], batch.values[inside]
        row["explained_variance"] = 1 - (returns - values).var() / returns.var().clamp_min(1e-8)
    return {name: float(x) for name, x in row.items()}


def speed(batch: Batch, clock: list[float]) -> dict[str, float]:
    """Seconds of the phases act, evaluate, learn; sampled tokens per second of the whole step; peak memory in GB."""
    act, evaluate, learn = (end - start for start, end in pairwise(clock))
    seconds = clock[-1] - clock[0]
    return {
        "seconds": seconds,
        "seconds_act": act,
        "seconds_evaluate": evaluate,
        "seconds_learn": learn,
        "tokens_per_second": int(batch.mask.sum()) / seconds,
        "peak_memory_gb": peak_memory(batch.mask.device) / 1e9,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
