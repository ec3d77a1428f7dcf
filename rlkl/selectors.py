"""Which tokens a loss is about, where that takes comparing rows: select(batch, uniforms, **options) -> (B, T) bool.

Called once per optimizer step, before micro-batching; the result is `batch.selected`. All look at pi_old, which is pi
at the first update. `uniforms` (B, T) is the only randomness. Chosen by rank, never by a threshold: ties cannot add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkl.types import Batch


def top_entropy(batch: Batch, uniforms: Tensor, *, fraction: float = 0.2) -> Tensor:
    """The tokens where pi_old was least certain, at least one (Wang et al. 2025, arXiv:2506.01939)."""
    return _highest(batch.old_entropy, batch.mask, fraction * int(batch.mask.sum()))


def kl_cov(batch: Batch, uniforms: Tensor, *, fraction: float = 2e-4) -> Tensor:
    """The tokens of largest covariance, at least one (Cui et al. 2025, arXiv:2505.22617)."""
    return _highest(covariance(batch), batch.mask, fraction * int(batch.mask.sum()))


def clip_cov(batch: Batch, uniforms: Tensor, *, fraction: float = 2e-4, low: float = 1.0, high: float = 5.0) -> Tensor:
    """Some, drawn at random, of the tokens with a covariance in (low, high) (Cui et al. 2025, arXiv:2505.22617).

    As many as `fraction` of all tokens, at least one.
    """
    cov = covariance(batch)
    candidates = batch.mask & (cov > low) & (cov < high)
    return _highest(uniforms, candidates, fraction * int(batch.mask.sum()))


def covariance(batch: Batch) -> Tensor:
    """(B, T) (log pi_old - its mean) · (A - its mean), means over all tokens (arXiv:2505.22617)."""
    a, logprobs = (x - x[batch.mask].mean() for x in (batch.advantages, batch.old_logprobs))
    return (a * logprobs).masked_fill(~batch.mask, 0.0)


def _highest(x: Tensor, among: Tensor, count: float) -> Tensor:
    """(B, T) bool: the `count` largest x where `among` is True, rounded down, at least one; the first of equals."""
    inside = x[among]
    chosen = torch.zeros_like(inside, dtype=torch.bool)
    chosen[inside.argsort(descending=True, stable=True)[: max(int(count + 1e-9), 1)]] = True
    return torch.zeros_like(among).masked_scatter(among, chosen)


SELECTORS = {"top_entropy": top_entropy, "clip_cov": clip_cov, "kl_cov": kl_cov}
