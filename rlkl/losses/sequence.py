"""Losses that look at the ratio of the whole response, not of one token.

With w_t = pi/pi_old per token, members use the geometric mean of a response's ratios,
exp(mean_t log w_t) (gspo, gmpo), or their product W = Π_t w_t (topr, vespo). The product is the
importance ratio of the response; the mean is the product made independent of length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlkl.losses.clip import (
    LOG_RATIO_LIMIT,
    Loss,
    clamped_exp,
    clipped_surrogate,
    clipped_tokens,
    importance_ratio,
)
from rlkl.types import Batch, PolicyOutput

MIN_RATIO = 1e-8  # of VESPO's W: its logarithm stays finite


def gspo(
    new: PolicyOutput, batch: Batch, *, epsilon: float = 3e-4, epsilon_high: float = 4e-4
) -> Loss:
    """Clipped surrogate of s = exp(mean_t log w_t) (GSPO, Zheng et al. 2025, arXiv:2507.18071).

    This is GSPO-token: s_t = sg(s) · pi/sg(pi), so each token has the value of s and the gradient
    of its own log-prob, and A may differ from token to token. The clip is that narrow because a
    mean of log-ratios is that small. The paper has optim.weights=sequence.
    """
    mean = _row_mean(new.logprobs.detach() - batch.old_logprobs, batch.mask)
    ratio = clamped_exp(mean) * (new.logprobs - new.logprobs.detach()).exp()
    loss = clipped_surrogate(ratio, batch.advantages, epsilon, epsilon_high)
    clip_fraction = clipped_tokens(ratio, batch.advantages, epsilon, epsilon_high)
    return loss, {"ratio": ratio, "clip_fraction": clip_fraction}


def gmpo(
    new: PolicyOutput, batch: Batch, *, epsilon: float = 0.4, epsilon_high: float = 0.4
) -> Loss:
    """-A exp(mean_t d_t), d = log w clipped on A's side (GMPO, arXiv:2507.20673).

    Each log-ratio is clipped before it enters the mean: to at most epsilon_high where A > 0, to at
    least -epsilon elsewhere. A clipped token has no gradient; the others share the response's. The
    paper has optim.weights=sequence.
    """
    advantages = batch.advantages
    log_ratio = new.logprobs - batch.old_logprobs
    clipped = torch.where(
        advantages > 0, log_ratio.clamp(max=epsilon_high), log_ratio.clamp(min=-epsilon)
    )
    ratio = clamped_exp(_row_mean(clipped, batch.mask)).expand_as(clipped)
    clip_fraction = (clipped != log_ratio).to(clipped.dtype)
    return -advantages * ratio, {"ratio": ratio, "clip_fraction": clip_fraction}


def topr(new: PolicyOutput, batch: Batch) -> Loss:
    """-sg(c) A log pi with c = 1 where A >= 0, else min(W, 1) (TOPR, arXiv:2503.14286).

    Tapered off-policy REINFORCE: good responses are reinforced however old they are; bad ones lose
    their weight as pi moves away from them. The paper has optim.weights=constant.
    """
    log_ratio = _row_sum(new.logprobs.detach() - batch.old_logprobs, batch.mask)
    taper = torch.where(batch.advantages < 0, log_ratio.clamp(-LOG_RATIO_LIMIT, 0).exp(), 1.0)
    loss = -taper * batch.advantages * new.logprobs
    return loss, {"ratio": importance_ratio(new.logprobs, batch.old_logprobs)}


def vespo(
    new: PolicyOutput,
    batch: Batch,
    *,
    k: float = 2.0,
    lam: float = 3.0,
    k_negative: float = 3.0,
    lam_negative: float = 2.0,
) -> Loss:
    """-sg(φ(W)) A log pi with φ(W) = W^k exp(λ(1 - W)) (VESPO, 2026, arXiv:2602.10693).

    A soft weight of the whole response: 1 where pi = pi_old, small where W is far from 1 on either
    side. `k_negative` and `lam_negative` hold where A < 0. The paper has optim.weights=token.
    """
    log_ratio = (new.logprobs.detach() - batch.old_logprobs).clamp(
        -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT
    )
    log_ratio = _row_sum(log_ratio, batch.mask).clamp(math.log(MIN_RATIO), LOG_RATIO_LIMIT)
    negative = batch.advantages < 0
    power = torch.where(negative, k_negative, torch.full_like(batch.advantages, k))
    rate = torch.where(negative, lam_negative, torch.full_like(batch.advantages, lam))
    weight = (rate + power * log_ratio - rate * log_ratio.exp()).exp()
    loss = -weight * batch.advantages * new.logprobs
    return loss, {"ratio": importance_ratio(new.logprobs, batch.old_logprobs)}


def _row_sum(x: Tensor, mask: Tensor) -> Tensor:
    """(B, 1) sum over the tokens of each response."""
    return x.masked_fill(~mask, 0.0).sum(1, keepdim=True)


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, 1) mean over the tokens of each response."""
    return _row_sum(x, mask) / mask.sum(1, keepdim=True).clamp_min(1)
