"""DPPO: a token's gradient stops once its *probability* has moved too far, not its ratio.

Members mask -sg(min(w, cap)) A log pi where a divergence between pi and mu, the policy that
sampled, exceeds epsilon in A's direction (arXiv:2602.04879). The divergence is that of the two
outcomes "this token" and "any other". A rare token may double where PPO's clip stops it; a likely
token stops where PPO's clip lets it go.

w is pi/pi_old, as in every loss here. Where the sampler's probabilities differ from pi_old's, that
factor belongs to A (`mismatch.truncate`).
"""

from __future__ import annotations

from torch import Tensor

from rlkl.losses.clip import Loss, importance_ratio
from rlkl.types import Batch, PolicyOutput


def dppo_tv(
    new: PolicyOutput,
    batch: Batch,
    *,
    epsilon: float = 0.15,
    epsilon_high: float | None = None,
    cap: float = 10.0,
) -> Loss:
    """DPPO-Binary-TV: the divergence is the total variation |pi - mu|. The paper: weights=token."""
    moved = new.logprobs.exp() - batch.sampler_logprobs.exp()
    return _masked(new, batch, moved, moved.abs(), epsilon, epsilon_high, cap)


def dppo_kl(
    new: PolicyOutput,
    batch: Batch,
    *,
    epsilon: float = 0.05,
    epsilon_high: float | None = None,
    cap: float = 10.0,
) -> Loss:
    """DPPO-Binary-KL: the divergence is KL(mu || pi), in nats. The paper: weights=token."""
    pi = new.logprobs.exp()
    mu = batch.sampler_logprobs.exp()
    not_pi = (1 - pi).clamp_min(0) + 1e-8
    not_mu = (1 - mu).clamp_min(0) + 1e-8
    of_this = mu * (batch.sampler_logprobs - new.logprobs)
    divergence = of_this + (1 - mu) * (not_mu / not_pi).log()
    return _masked(new, batch, pi - mu, divergence, epsilon, epsilon_high, cap)


def _masked(
    new: PolicyOutput,
    batch: Batch,
    moved: Tensor,
    divergence: Tensor,
    epsilon: float,
    epsilon_high: float | None,
    cap: float,
) -> Loss:
    """The capped policy gradient, zero where `moved` has A's sign and divergence is too large."""
    high = epsilon if epsilon_high is None else epsilon_high
    advantages = batch.advantages
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    too_high = (advantages > 0) & (moved > 0) & (divergence > high)
    too_low = (advantages < 0) & (moved < 0) & (divergence > epsilon)
    outside = too_high | too_low
    loss = -ratio.clamp(max=cap).detach() * advantages * new.logprobs
    clip_fraction = outside.to(ratio.dtype)
    return loss.masked_fill(outside, 0.0), {"ratio": ratio, "clip_fraction": clip_fraction}
