"""The value loss: how the critic is trained. Any policy loss goes with it, or without a critic."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2
) -> Tensor:
    """(B, T) max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²) / 2, as in OpenAI's PPO2.

    The critic's own trust region: a value that has moved further than `clip` from V_old towards R
    gets no more gradient. None is the squared error, (V - R)² / 2.
    """
    if clip is None:
        return (values - returns).square() / 2
    near_old = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near_old - returns).square()) / 2
