"""Smooth trust regions: the gradient fades, or turns back, where the clip cuts it off.

Members are functions of the token's ratio w = pi/pi_old and of A alone, like the clip.
"""

from __future__ import annotations

import torch

from rlkl.losses.clip import Loss, importance_ratio
from rlkl.types import Batch, PolicyOutput


def sapo(new: PolicyOutput, batch: Batch, *, tau: float = 1.0, tau_negative: float = 1.05) -> Loss:
    """-A · 4/τ · sigmoid(τ (w - 1)) (SAPO, Gao et al. 2025, arXiv:2511.20347).

    τ is `tau` where A > 0, else `tau_negative`. The larger τ for A < 0 closes the gate sooner:
    pushing a token down spreads its probability over tokens that nobody sampled. The paper has
    optim.weights=sequence.
    """
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    advantages = batch.advantages
    t = torch.where(advantages > 0, tau, torch.full_like(advantages, tau_negative))
    loss = -advantages * torch.sigmoid(t * (ratio - 1)) * 4 / t
    return loss, {"ratio": ratio}


def spo(new: PolicyOutput, batch: Batch, *, epsilon: float = 0.2) -> Loss:
    """-(w A - |A|/(2ε) (w - 1)²) (SPO, Xie et al. 2024, arXiv:2401.16025).

    A parabola whose best w is 1 ± ε, where PPO's clip begins; beyond it the gradient turns back.
    The paper has optim.weights=token.
    """
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    advantages = batch.advantages
    loss = advantages.abs() / (2 * epsilon) * (ratio - 1).square() - ratio * advantages
    return loss, {"ratio": ratio}
