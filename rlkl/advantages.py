"""Credit assignment: token rewards (B, T) → advantages (B, T), zero outside the mask, and value targets (B, T) or None.

`rewards` already holds all that is paid: the score on the last token, -coef·KL on every token if KL is in the reward.
Masked tokens do not exist in time: values and λ-sums are carried *through* them.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Credit = tuple[Tensor, Tensor | None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, group_size: int = 1, gamma: float = 1.0, lam: float = 0.95,
        lam_critic: float | None = None, whiten: bool = True) -> Credit:
    """Generalised advantage estimation, one reply = one episode (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    A_t = δ_t + γλ A_{t+1},  δ_t = r_t + γ V_{t+1} - V_t,  V after the last token = 0; returns = A + V.
    Advantages are whitened afterwards.
    `lam_critic` gives the value targets a λ of their own (VC-PPO, Yuan et al. 2025, arXiv:2503.01491).
    """
    if values is None:
        raise ValueError("gae needs a critic: set model.critic to head or network")
    advantages = _gae(rewards, values, mask, gamma, lam)
    targets = advantages if lam_critic is None else _gae(rewards, values, mask, gamma, lam_critic)
    returns = (targets + values).masked_fill(~mask, 0.0)
    return (whitened(advantages, mask) if whiten else advantages), returns


def _gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    next_value, running, columns = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for r, v, m in zip(rewards.flip(1).unbind(1), values.flip(1).unbind(1), mask.flip(1).unbind(1), strict=True):
        running = torch.where(m, r + gamma * next_value - v + gamma * lam * running, running)
        next_value = torch.where(m, v, next_value)
        columns.append(torch.where(m, running, 0.0))
    return torch.stack(columns[::-1], 1)


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean, unit variance over the mask: Bessel variance, rsqrt(var + 1e-8), zero outside the mask."""
    inside = x[mask]
    if len(inside) < 2:
        return torch.zeros_like(x)
    return ((x - inside.mean()) * (inside.var() + 1e-8).rsqrt()).masked_fill(~mask, 0.0)


def grpo(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int, scale: Literal["group", "batch"] = "group"
) -> Credit:
    """(R - mean) / (std + 1e-6) over the samples of a prompt, ddof 1 (Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2).

    scale = batch divides by the std over the whole rollout instead (Liu et al. 2025, arXiv:2508.08221).
    """
    returns, centred = _centred(rewards, mask, group_size)
    if returns.numel() < 2 or group_size < 2:
        return _spread(torch.zeros_like(centred), mask), None
    std = returns.std(1, keepdim=True) if scale == "group" else returns.std()
    return _spread(centred / (std + 1e-6), mask), None


def dr_grpo(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Credit:
    """R - mean over the samples of a prompt, no std (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783)."""
    return _spread(_centred(rewards, mask, group_size)[1], mask), None


def rloo(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Credit:
    """R - mean of the *other* samples = G/(G-1) · (R - mean) (RLOO, Ahmadian et al. 2024, arXiv:2402.14740)."""
    centred = _centred(rewards, mask, group_size)[1]
    return _spread(centred * (group_size / max(group_size - 1, 1)), mask), None


def _centred(rewards: Tensor, mask: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(n g) summed rewards, and their deviation from the group's mean: exactly 0 if the group is unanimous."""
    if len(mask) % group_size:
        raise ValueError(f"{len(mask)} rows do not divide into groups of {group_size}")
    returns = rearrange(rewards.masked_fill(~mask, 0.0).sum(1), "(n g) -> n g", g=group_size)
    unanimous = returns.amax(1, keepdim=True) == returns.amin(1, keepdim=True)  # the std of equal floats is not 0
    return returns, (returns - returns.mean(1, keepdim=True)).masked_fill(unanimous, 0.0)


def _spread(per_row: Tensor, mask: Tensor) -> Tensor:
    """(n g) one number per reply → (B, T) on each of its tokens."""
    return rearrange(per_row, "n g -> (n g) 1").expand(mask.shape).masked_fill(~mask, 0.0)


ADVANTAGES = {"gae": gae, "grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
