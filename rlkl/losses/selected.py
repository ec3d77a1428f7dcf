"""Losses that treat a few tokens differently: those that `selector` picked for the optimizer step.

Each needs the selector of the same name (losses/selectors.py), which fills `batch.selected`. Their
papers have optim.weights=token; a token that does not learn still counts in the denominator.
"""

from __future__ import annotations

from torch import Tensor

from rlkl.losses.clip import Loss, clip
from rlkl.losses.policy_gradient import surrogate
from rlkl.types import Batch, PolicyOutput


def top_entropy(
    new: PolicyOutput, batch: Batch, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> Loss:
    """clip on the selected tokens alone: those of highest entropy (arXiv:2506.01939)."""
    loss, diagnostics = clip(new, batch, epsilon=epsilon, epsilon_high=epsilon_high)
    return loss.masked_fill(~_selected(batch, "top_entropy"), 0.0), diagnostics


def clip_cov(
    new: PolicyOutput, batch: Batch, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> Loss:
    """clip without the selected tokens (Clip-Cov, Cui et al. 2025, arXiv:2505.22617).

    They are drawn from those where log pi and A are both high, which make the entropy collapse.
    """
    loss, diagnostics = clip(new, batch, epsilon=epsilon, epsilon_high=epsilon_high)
    return loss.masked_fill(_selected(batch, "clip_cov"), 0.0), diagnostics


def kl_cov(new: PolicyOutput, batch: Batch, *, coef: float = 1.0) -> Loss:
    """surrogate + coef · |log w| on the selected tokens (KL-Cov, arXiv:2505.22617).

    Nothing is clipped: the tokens that make the entropy collapse are held near pi_old, all others
    are free. The diagnostic `moved` is |log w| on the selected tokens.
    """
    loss, diagnostics = surrogate(new, batch)
    log_ratio = (new.logprobs - batch.old_logprobs).abs()
    moved = log_ratio.masked_fill(~_selected(batch, "kl_cov"), 0.0)
    return loss + coef * moved, diagnostics | {"moved": moved}


def _selected(batch: Batch, name: str) -> Tensor:
    """(B, T) bool. Raises ValueError where no selector has run."""
    if batch.selected is None:
        raise ValueError(f"{name} acts on selected tokens: set selector={name}")
    return batch.selected
