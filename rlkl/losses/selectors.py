"""Selectors: which tokens a loss treats differently, where that takes comparing rows.

A selector is select(batch, uniforms, **options) -> (B, T) bool. The loop calls it once per
optimizer step, before micro-batching, and stores the result in `batch.selected`. All of them look
at pi_old, which is pi at the first update. `uniforms` (B, T) is the only randomness. Tokens are
chosen by rank and never by a threshold, so that ties cannot add up to more than the fraction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkl.types import Batch


def top_entropy(batch: Batch, uniforms: Tensor, *, fraction: float = 0.2) -> Tensor:
    """The `fraction` of tokens of highest entropy under pi_old, at least one (arXiv:2506.01939)."""
    return _highest(batch.old_entropy, batch.mask, fraction * int(batch.mask.sum()))


def kl_cov(batch: Batch, uniforms: Tensor, *, fraction: float = 2e-4) -> Tensor:
    """The `fraction` of tokens of highest covariance, at least one (arXiv:2505.22617)."""
    return _highest(covariance(batch), batch.mask, fraction * int(batch.mask.sum()))


def clip_cov(
    batch: Batch,
    uniforms: Tensor,
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
) -> Tensor:
    """A random `fraction` of all tokens, from those with a covariance in (low, high), at least one.

    Cui et al. 2025, arXiv:2505.22617.
    """
    cov = covariance(batch)
    candidates = batch.mask & (cov > low) & (cov < high)
    return _highest(uniforms, candidates, fraction * int(batch.mask.sum()))


def covariance(batch: Batch) -> Tensor:
    """(B, T) (log pi_old - its mean) · (A - its mean), means over all tokens (arXiv:2505.22617)."""
    advantages = batch.advantages - batch.advantages[batch.mask].mean()
    logprobs = batch.old_logprobs - batch.old_logprobs[batch.mask].mean()
    return (advantages * logprobs).masked_fill(~batch.mask, 0.0)


def _highest(x: Tensor, among: Tensor, count: float) -> Tensor:
    """(B, T) bool: the `count` largest x where `among` is True, rounded down, at least one.

    Of equal values the first ones.
    """
    inside = x[among]
    chosen = torch.zeros_like(inside, dtype=torch.bool)
    order = inside.argsort(descending=True, stable=True)
    chosen[order[: max(int(count + 1e-9), 1)]] = True
    return torch.zeros_like(among).masked_scatter(among, chosen)


SELECTORS = {"top_entropy": top_entropy, "clip_cov": clip_cov, "kl_cov": kl_cov}
