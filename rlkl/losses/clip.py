"""The clipped surrogate: the policy loss of PPO, GRPO, DAPO and Dr. GRPO. It is the trust region.

    L_t = -min( w_t A_t,  clip(w_t, 1 - ε, 1 + ε_high) A_t )
    w_t = pi(a_t | s_t) / pi_old(a_t | s_t)

PPO and GRPO share this loss. They differ in the advantage A (a critic's GAE, or the score relative
to the group) and in how tokens are weighted in the sum (`optim.weights`):

    method     advantage   weights    ε, ε_high
    PPO        gae         token      0.2, 0.2
    GRPO       grpo        sequence   0.2, 0.2
    DAPO       grpo        token      0.2, 0.28     ("clip-higher")
    Dr. GRPO   dr_grpo     constant   0.2, 0.2

Where a token's gradient stops, for A > 0 and A < 0:

    w           below 1 - ε    inside    above 1 + ε_high    above delta
    A > 0       flows          flows     stops               stops
    A < 0       stops          flows     flows               stops

So the clip stops a token that has already moved far enough in the direction that A asks for. It
never stops one that moved the wrong way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlkl.types import Batch, PolicyOutput

Loss = tuple[Tensor, dict[str, Tensor]]  # (B, T) loss of each token, and (B, T) diagnostics by name

LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: far outside any trust region, and still finite


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """(B, T) w = pi / pi_old of each token, its logarithm clamped to ±20."""
    return clamped_exp(logprobs - old_logprobs)


def clamped_exp(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), the log-ratio clamped to ±20. Outside the clamp it has no gradient."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clip(
    new: PolicyOutput,
    batch: Batch,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float = math.inf,
) -> Loss:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    GRPO has the same one (Shao et al. 2024, arXiv:2402.03300, eq. 3).

    epsilon: lower side of the clip, and upper side too unless epsilon_high is given.
    epsilon_high: upper side of the clip (DAPO's clip-higher, arXiv:2503.14476, eq. 10).
    delta: bounds w where A < 0, where the clip alone leaves large w free (dual clip, Ye et al.
    2020, arXiv:1912.09729; two-sided GRPO clipping in TRL). The option names are TRL's.

    Returns the (B, T) loss and the diagnostics `ratio` (w) and `clip_fraction`, which is 1.0 where
    the gradient is zero because of the clip.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    advantages = batch.advantages
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    bounded = torch.where(advantages < 0, ratio.clamp(max=delta), ratio)
    loss = clipped_surrogate(bounded, advantages, epsilon, high)
    clip_fraction = clipped_tokens(ratio, advantages, epsilon, high, delta)
    return loss, {"ratio": ratio, "clip_fraction": clip_fraction}


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """(B, T) -min(w A, clip(w, 1 - low, 1 + high) A): the pessimistic one of the two."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_tokens(
    ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float = math.inf
) -> Tensor:
    """(B, T) 1.0 where the clip made the gradient zero, else 0.0.

    That is w beyond the clip in A's direction, and not any |w - 1| > ε.
    """
    too_high = (ratio > 1 + high) & (advantages > 0)
    too_low = (ratio < 1 - low) & (advantages < 0)
    too_far = (ratio > delta) & (advantages < 0)
    return (too_high | too_low | too_far).to(ratio.dtype)
