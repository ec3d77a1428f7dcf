"""Controls for `make first-result`: the real advantages, given to other responses.

A run with `advantage.name=tests/shuffled.py:grpo` learns nothing, unless something leaks. The order
comes from torch's global generator, which is seeded at each step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rlkl import advantages as estimators


def shuffled(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B, T) advantages with their rows permuted, on the tokens that the receiving response has."""
    order = torch.randperm(len(mask)).to(mask.device)
    return advantages[order].masked_fill(~mask, 0.0)


@functools.wraps(estimators.grpo)  # and so with its options
def grpo(
    rewards: Tensor, values: Tensor | None, mask: Tensor, **options: Any
) -> estimators.Advantages:
    """The one number of each response goes to another response, on all of that one's tokens."""
    advantages, returns = estimators.grpo(rewards, values, mask, **options)
    first = mask.long().argmax(1, keepdim=True)  # any token would do: they have the same advantage
    per_row = advantages.gather(1, first)
    return shuffled(per_row.expand(mask.shape), mask), returns


@functools.wraps(estimators.gae)
def gae(rewards: Tensor, values: Tensor, mask: Tensor, **options: Any) -> estimators.Advantages:
    """Token by token; the critic keeps its own targets."""
    advantages, returns = estimators.gae(rewards, values, mask, **options)
    return shuffled(advantages, mask), returns
