"""Controls for `make learn`: the real advantages, given to the wrong replies. What still learns, learns from a leak.

`advantage.name=tests/shuffled.py:grpo`. The order comes from torch's global generator, seeded at each step.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlkl import advantages


def shuffled(found: Tensor, mask: Tensor) -> Tensor:
    """(B, T) advantages with their rows permuted, on the tokens that the receiving reply has."""
    order = torch.randperm(len(mask)).to(mask.device)
    return found[order].masked_fill(~mask, 0.0)


def grpo(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int, scale: Literal["group", "batch"] = "group"
) -> advantages.Credit:
    """One number per reply: it is carried to another reply, and spread over that one's tokens."""
    found, returns = advantages.grpo(rewards, values, mask, group_size=group_size, scale=scale)
    first = mask.long().argmax(1, keepdim=True)  # the advantage of a reply stands on each of its tokens
    return shuffled(found.gather(1, first).expand(mask.shape), mask), returns


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    group_size: int = 1,
    gamma: float = 1.0,
    lam: float = 0.95,
    lam_critic: float | None = None,
    lam_alpha: float = 0.0,
    whiten: bool = True,
) -> advantages.Credit:
    """Token by token; the critic keeps its own targets."""
    options = {"gamma": gamma, "lam": lam, "lam_critic": lam_critic, "lam_alpha": lam_alpha, "whiten": whiten}
    found, returns = advantages.gae(rewards, values, mask, group_size=group_size, **options)
    return shuffled(found, mask), returns
