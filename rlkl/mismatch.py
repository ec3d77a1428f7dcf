"""The sampler is not the trainer: mu, as the sampler reported it, against pi_old, by the training forward pass.

The same weights can give other log-probs in another kernel. Truncated importance sampling (TIS) multiplies the
advantages, once per step: every policy loss is positively homogeneous in A. Rejection multiplies the weights, after
their denominators are fixed, so that survivors do not count for more. No loss knows of either.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rlkl.types import Batch


def truncated_ratio(batch: Batch, level: Literal["token", "sequence"], cap: float) -> Tensor:
    """min(pi_old/mu, cap), of each token or of its whole reply, (B, T) (TIS, Yao et al. 2025)."""
    return _ratio(batch, level).clamp(max=cap)


def accepted(batch: Batch, level: Literal["token", "sequence", "mean"], low: float, high: float) -> Tensor:
    """(B, T) bool: is pi_old/mu within [low, high], for each token, the product over its reply, or the geometric mean?

    By token IcePop's mask, by reply TRL's sequence mask and verl's geometric rejection.
    """
    ratio = _ratio(batch, level)
    return (ratio >= low) & (ratio <= high) & batch.mask


def _ratio(batch: Batch, level: str) -> Tensor:
    """(B, T) pi_old/mu: the token's, or its reply's product or geometric mean; the logarithm is clamped to ±20."""
    log_ratio = (batch.old_logprobs - batch.sampler_logprobs).masked_fill(~batch.mask, 0.0)
    if level != "token":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    if level == "mean":
        log_ratio = log_ratio / batch.mask.sum(1, keepdim=True).clamp_min(1)
    return log_ratio.clamp(-20, 20).exp()
