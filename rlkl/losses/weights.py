"""The weight of each token in the loss, and the correction for a sampler that is not the trainer.

Denominators are computed once per optimizer step, over the whole minibatch, before it is cut into
micro-batches: how it is cut cannot change the gradient.

The sampler's log-probs (mu) and those of the training forward pass (pi_old) differ where kernels
round differently. Two corrections, off by default (`mismatch`):

    truncated importance sampling   advantages · min(pi_old/mu, cap), once per step. Right for every
                                    policy loss, as each is positively homogeneous in A; only the
                                    penalty of kl_cov does not depend on A, and stays as it is.
    rejection                       weight 0 where pi_old/mu is out of bounds. It comes after the
                                    denominators, so the tokens that are left do not count for more.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlkl.losses.clip import clamped_exp
from rlkl.types import Batch


def token_weights(
    mask: Tensor,
    how: Literal["token", "sequence", "constant"],
    max_tokens: int,
    totals: tuple[int, int] | None = None,
) -> Tensor:
    """(B, T) weights, so that the loss of an optimizer step is (weights · per_token)[mask].sum().

    token: every token counts the same (PPO, DAPO).
    sequence: every response counts the same (GRPO).
    constant: every token counts 1 / (rows · max_tokens), a fixed length (Dr. GRPO).
    totals: (rows, tokens) of the whole optimizer step, where this mask is a part of it.
    A row without a token does not count. Raises ValueError on another `how`.
    """
    # float64, so that 1/n costs no precision; MPS has none
    m = mask.to(torch.float32 if mask.device.type == "mps" else torch.float64)
    rows, tokens = totals or (int(mask.any(1).sum()), int(mask.sum()))
    if how == "token":
        return m / max(tokens, 1)
    if how == "sequence":
        return m / m.sum(1, keepdim=True).clamp_min(1) / max(rows, 1)
    if how == "constant":
        return m / (max(rows, 1) * max_tokens)
    raise ValueError(f"weights {how!r}: choose token, sequence or constant")


def truncated_importance_weights(
    batch: Batch, level: Literal["token", "sequence"], cap: float
) -> Tensor:
    """(B, T) min(pi_old/mu, cap), of each token or of its whole response (TIS, Yao et al. 2025)."""
    return _sampler_ratio(batch, level).clamp(max=cap)


def accepted(
    batch: Batch, level: Literal["token", "sequence", "mean"], low: float, high: float
) -> Tensor:
    """(B, T) bool: True where pi_old/mu is within [low, high].

    token: the ratio of the token (IcePop). sequence: the product over its response (TRL). mean: the
    geometric mean over its response (verl).
    """
    ratio = _sampler_ratio(batch, level)
    return (ratio >= low) & (ratio <= high) & batch.mask


def _sampler_ratio(batch: Batch, level: str) -> Tensor:
    """(B, T) pi_old/mu of the token, or of its response; the logarithm is clamped to ±20."""
    log_ratio = (batch.old_logprobs - batch.sampler_logprobs).masked_fill(~batch.mask, 0.0)
    if level != "token":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    if level == "mean":
        log_ratio = log_ratio / batch.mask.sum(1, keepdim=True).clamp_min(1)
    return clamped_exp(log_ratio)
