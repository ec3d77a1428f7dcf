"""Policy objectives: unreduced (B, T) losses and (B, T) diagnostics. train.py weights, adds the KL terms and reduces.

The keyword-only arguments of a loss are its options in YAML. A loss contains no KL to the reference, never divides by a
token count, and never compares rows. To add your own: a function like these, in any file, `loss.name=file.py:function`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rlkl.selectors import SELECTORS as SELECTORS
from rlkl.types import Batch, Evaluation

Loss = tuple[Tensor, dict[str, Tensor]]


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi / pi_old per token, (B, T); the log-ratio is clamped to ±20 so that one broken token cannot overflow."""
    return (logprobs - old_logprobs).clamp(-20, 20).exp()


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float,
        cap: float = torch.inf) -> tuple[Tensor, Tensor]:
    """-min(w A, clip(w, 1-low, 1+high) A) and w = pi/pi_old, (B, T) (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    The trust region: once w has moved past the clip in the direction A asks for, the token's gradient is zero.
    Where A < 0 that leaves large w free; `cap` holds them too: dual clip (Ye et al. 2020, arXiv:1912.09729).
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    held = torch.where(advantages < 0, ratio.clamp(max=cap), ratio)
    return _pessimistic(held, advantages, low, high), ratio


def _pessimistic(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_tokens(ratio: Tensor, advantages: Tensor, low: float, high: float, cap: float = torch.inf) -> Tensor:
    """(B, T) 1.0 where the clip killed the gradient: w beyond it in A's direction, not any |w - 1| > clip."""
    dead = (ratio > 1 + high) & (advantages > 0) | ((ratio < 1 - low) | (ratio > cap)) & (advantages < 0)
    return dead.to(ratio.dtype)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²) / 2, (B, T), as in openai/baselines ppo2."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def ppo(new: Evaluation, batch: Batch, *, clip: float = 0.2, clip_high: float | None = None, cap: float = torch.inf,
        value_coef: float = 0.5, value_clip: float = 0.2, entropy_coef: float = 0.0) -> Loss:
    """Clipped surrogate + value loss - entropy bonus (Schulman et al. 2017, eq. 9). Weights: token.

    `clip_high` widens the upper side only; `cap` clips dually, as in dual_clip.
    """
    if new.values is None or batch.values is None or batch.returns is None:
        raise ValueError("ppo needs a critic: set model.critic to head or network, and advantage.name to gae")
    high = clip if clip_high is None else clip_high
    policy, ratio = clipped_surrogate(new.logprobs, batch.old_logprobs, batch.advantages, clip, high, cap)
    value = clipped_value_loss(new.values, batch.values, batch.returns, value_clip)
    clipped = clipped_tokens(ratio, batch.advantages, clip, high, cap)
    stats = {"policy_loss": policy, "value_loss": value, "ratio": ratio, "clip_fraction": clipped}
    return policy + value_coef * value - entropy_coef * new.entropy, stats


def grpo(new: Evaluation, batch: Batch, *, clip: float = 0.2, clip_high: float | None = None,
        entropy_coef: float = 0.0) -> Loss:
    """Clipped surrogate without a critic (Shao et al. 2024, arXiv:2402.03300, eq. 3, less its KL). Weights: sequence.

    `clip_high` widens the upper side only: DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476, eq. 10).
    """
    high = clip if clip_high is None else clip_high
    policy, ratio = clipped_surrogate(new.logprobs, batch.old_logprobs, batch.advantages, clip, high)
    clipped = clipped_tokens(ratio, batch.advantages, clip, high)
    stats = {"policy_loss": policy, "ratio": ratio, "clip_fraction": clipped}
    return policy - entropy_coef * new.entropy, stats


def dual_clip(new: Evaluation, batch: Batch, *, clip: float = 0.2, clip_high: float | None = None, cap: float = 3.0,
        entropy_coef: float = 0.0) -> Loss:
    """grpo whose loss is at most cap·|A| where A < 0 (Ye et al. 2020, arXiv:1912.09729). Weights: sequence.

    Above 1 + clip_high it is TRL's `delta`, INTELLECT-2's two-sided clip.
    """
    high = clip if clip_high is None else clip_high
    policy, ratio = clipped_surrogate(new.logprobs, batch.old_logprobs, batch.advantages, clip, high, cap)
    clipped = clipped_tokens(ratio, batch.advantages, clip, high, cap)
    stats = {"policy_loss": policy, "ratio": ratio, "clip_fraction": clipped}
    return policy - entropy_coef * new.entropy, stats


def surrogate(new: Evaluation, batch: Batch, *, entropy_coef: float = 0.0) -> Loss:
    """-w A, unclipped; with kl_old it is PPO-penalty (Schulman et al. 2017, eq. 6 and 8). Weights: token."""
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    policy = -ratio * batch.advantages
    return policy - entropy_coef * new.entropy, {"policy_loss": policy, "ratio": ratio}


def reinforce(new: Evaluation, batch: Batch, *, entropy_coef: float = 0.0) -> Loss:
    """-A log pi, without a ratio: on-policy only (Williams 1992). Weights: constant."""
    policy = -batch.advantages * new.logprobs
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    return policy - entropy_coef * new.entropy, {"policy_loss": policy, "ratio": ratio}


def gspo(new: Evaluation, batch: Batch, *, clip: float = 3e-4, clip_high: float = 4e-4,
        entropy_coef: float = 0.0) -> Loss:
    """Clipped surrogate of the reply's ratio s = exp(mean_t log w_t) (GSPO, Zheng et al. 2025, arXiv:2507.18071).

    In the token form, s_t = sg(s) · pi/sg(pi): each token has the value of s and the gradient of its own log-prob, so
    that A may differ from token to token. The clip is that small because a mean of log-ratios is. Weights: sequence.
    """
    mean = _row_mean(new.logprobs.detach() - batch.old_logprobs, batch.mask)
    ratio = mean.clamp(-20, 20).exp() * (new.logprobs - new.logprobs.detach()).exp()
    policy = _pessimistic(ratio, batch.advantages, clip, clip_high)
    clipped = clipped_tokens(ratio, batch.advantages, clip, clip_high)
    return policy - entropy_coef * new.entropy, {"policy_loss": policy, "ratio": ratio, "clip_fraction": clipped}


def gmpo(new: Evaluation, batch: Batch, *, clip: float = 0.4, clip_high: float = 0.4,
        entropy_coef: float = 0.0) -> Loss:
    """-A exp(mean_t d_t), d = log w clipped on A's side (GMPO, Zhao et al. 2025, arXiv:2507.20673). Weights: sequence.

    The geometric mean of the reply's ratios, each held in log space before it enters, to at most clip_high where A > 0
    and at least -clip elsewhere. A token past its clip has no gradient; the others have the reply's, on equal shares.
    """
    a, log_ratio = batch.advantages, new.logprobs - batch.old_logprobs
    held = torch.where(a > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip))
    ratio = _row_mean(held, batch.mask).clamp(-20, 20).exp().expand_as(held)
    policy, clipped = -a * ratio, (held != log_ratio).to(held.dtype)
    return policy - entropy_coef * new.entropy, {"policy_loss": policy, "ratio": ratio, "clip_fraction": clipped}


def cispo(new: Evaluation, batch: Batch, *, cap: float = 5.0, entropy_coef: float = 0.0) -> Loss:
    """-sg(min(w, cap)) A log pi: a truncated weight, no dead token (MiniMax 2025, arXiv:2506.13585). Weights: token.

    `cap` bounds w itself, as in ScaleRL and TRL. verl clips w to [1-low, 1+high], which is another loss: small w rise.
    """
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    policy = -ratio.clamp(max=cap).detach() * batch.advantages * new.logprobs
    return policy - entropy_coef * new.entropy, {
        "policy_loss": policy, "ratio": ratio, "cap_fraction": (ratio > cap).to(ratio.dtype)}


def sapo(new: Evaluation, batch: Batch, *, tau: float = 1.0, tau_negative: float = 1.05,
        entropy_coef: float = 0.0) -> Loss:
    """-A · 4/τ · σ(τ(w-1)): a gate that closes smoothly (SAPO, Gao et al. 2025, arXiv:2511.20347). Weights: sequence.

    τ = tau where A > 0, else tau_negative: what is punished may move less, as it frees mass for tokens nobody chose.
    """
    ratio, a = importance_ratio(new.logprobs, batch.old_logprobs), batch.advantages
    t = torch.where(a > 0, tau, torch.full_like(a, tau_negative))
    policy = -a * torch.sigmoid(t * (ratio - 1)) * 4 / t
    return policy - entropy_coef * new.entropy, {"policy_loss": policy, "ratio": ratio}


def dppo_tv(new: Evaluation, batch: Batch, *, clip: float = 0.15, clip_high: float | None = None, cap: float = 10.0,
        entropy_coef: float = 0.0) -> Loss:
    """-sg(min(w, cap)) M A log pi, M = 0 once |pi - mu| > clip in A's direction (arXiv:2602.04879). Weights: token.

    DPPO-Binary-TV: the total variation between (this token, any other) under pi and under mu, the policy that sampled.
    So a rare token may double where PPO stops it, and a likely one stops where PPO lets go. w = pi/pi_old, as in every
    loss here: pi_old/mu, by which the sampler differs, is a factor of A (TIS).
    """
    moved = new.logprobs.exp() - batch.sampler_logprobs.exp()
    return _masked_policy_gradient(new, batch, moved, moved.abs(), clip, clip_high, cap, entropy_coef)


def dppo_kl(new: Evaluation, batch: Batch, *, clip: float = 0.05, clip_high: float | None = None, cap: float = 10.0,
        entropy_coef: float = 0.0) -> Loss:
    """DPPO-Binary-KL: dppo_tv with KL(mu || pi) of (this token, any other) (arXiv:2602.04879). Weights: token."""
    pi, mu = new.logprobs.exp(), batch.sampler_logprobs.exp()
    not_pi, not_mu = ((1 - p).clamp_min(0) + 1e-8 for p in (pi, mu))
    divergence = mu * (batch.sampler_logprobs - new.logprobs) + (1 - mu) * (not_mu / not_pi).log()
    return _masked_policy_gradient(new, batch, pi - mu, divergence, clip, clip_high, cap, entropy_coef)


def _masked_policy_gradient(new: Evaluation, batch: Batch, moved: Tensor, divergence: Tensor, clip: float,
        clip_high: float | None, cap: float, entropy_coef: float) -> Loss:
    high, a = clip if clip_high is None else clip_high, batch.advantages
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    outside = (a > 0) & (moved > 0) & (divergence > high) | (a < 0) & (moved < 0) & (divergence > clip)
    policy = (-ratio.clamp(max=cap).detach() * a * new.logprobs).masked_fill(outside, 0.0)
    return policy - entropy_coef * new.entropy, {
        "policy_loss": policy, "ratio": ratio, "clip_fraction": outside.to(ratio.dtype)}


def topr(new: Evaluation, batch: Batch, *, entropy_coef: float = 0.0) -> Loss:
    """-sg(c) A log pi, c = 1 where A >= 0, else min(W, 1), W = Π_t w_t (Le Roux et al. 2025, arXiv:2503.14286).

    Tapered off-policy REINFORCE: good replies are imitated however old; bad ones lose their weight as pi leaves them.
    Weights: constant.
    """
    whole = _row_sum(new.logprobs.detach() - batch.old_logprobs, batch.mask)
    taper = torch.where(batch.advantages < 0, whole.clamp(-20, 0).exp(), 1.0)
    policy = -taper * batch.advantages * new.logprobs
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    return policy - entropy_coef * new.entropy, {"policy_loss": policy, "ratio": ratio}


def spo(new: Evaluation, batch: Batch, *, clip: float = 0.2, entropy_coef: float = 0.0) -> Loss:
    """-(w A - |A|/(2 clip) (w-1)²): best at w = 1 ± clip, pulled back beyond (SPO, Xie et al. 2024, arXiv:2401.16025).

    The parabola's top is where PPO's clip begins, so no gradient is dead but there. Weights: token.
    """
    ratio, a = importance_ratio(new.logprobs, batch.old_logprobs), batch.advantages
    policy = a.abs() / (2 * clip) * (ratio - 1).square() - ratio * a
    return policy - entropy_coef * new.entropy, {"policy_loss": policy, "ratio": ratio}


def vespo(new: Evaluation, batch: Batch, *, k: float = 2.0, lam: float = 3.0, k_negative: float = 3.0,
        lam_negative: float = 2.0, entropy_coef: float = 0.0) -> Loss:
    """-sg(φ(W)) A log pi, φ(W) = W^k exp(λ(1 - W)), W = Π_t w_t (VESPO, 2026, arXiv:2602.10693). Weights: token.

    A soft weight of the whole reply: 1 where nothing moved, small where W is far from 1 on either side.
    """
    whole = _row_sum((new.logprobs.detach() - batch.old_logprobs).clamp(-20, 20), batch.mask).clamp(math.log(1e-8), 20)
    powers = torch.where(batch.advantages < 0, k_negative, torch.full_like(batch.advantages, k))
    rates = torch.where(batch.advantages < 0, lam_negative, torch.full_like(batch.advantages, lam))
    policy = -(rates + powers * whole - rates * whole.exp()).exp() * batch.advantages * new.logprobs
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    return policy - entropy_coef * new.entropy, {"policy_loss": policy, "ratio": ratio}


def top_entropy(new: Evaluation, batch: Batch, *, clip: float = 0.2, clip_high: float | None = None,
        entropy_coef: float = 0.0) -> Loss:
    """grpo on the selected tokens alone, as selector=top_entropy picks them (Wang et al. 2025, arXiv:2506.01939).

    The forking tokens learn, the others still count in the denominator. Weights: token.
    """
    policy, stats = grpo(new, batch, clip=clip, clip_high=clip_high)
    policy = policy.masked_fill(~_selected(batch, "top_entropy"), 0.0)
    return policy - entropy_coef * new.entropy, stats | {"policy_loss": policy}


def clip_cov(new: Evaluation, batch: Batch, *, clip: float = 0.2, clip_high: float | None = None,
        entropy_coef: float = 0.0) -> Loss:
    """grpo without the selected tokens, as selector=clip_cov draws them (Cui et al. 2025, arXiv:2505.22617).

    They are some of those where log pi and A are both high, which is what makes entropy collapse. Weights: token.
    """
    policy, stats = grpo(new, batch, clip=clip, clip_high=clip_high)
    policy = policy.masked_fill(_selected(batch, "clip_cov"), 0.0)
    return policy - entropy_coef * new.entropy, stats | {"policy_loss": policy}


def kl_cov(new: Evaluation, batch: Batch, *, coef: float = 1.0, entropy_coef: float = 0.0) -> Loss:
    """surrogate + coef · |log w| on the selected tokens, as selector=kl_cov picks them (arXiv:2505.22617).

    Not clipped: what drives the collapse is held near pi_old, all else is free. Weights: token.
    """
    policy, stats = surrogate(new, batch)
    moved = (new.logprobs - batch.old_logprobs).abs().masked_fill(~_selected(batch, "kl_cov"), 0.0)
    return policy + coef * moved - entropy_coef * new.entropy, stats | {"moved": moved}


def _selected(batch: Batch, name: str) -> Tensor:
    if batch.selected is None:
        raise ValueError(f"{name} acts on selected tokens: set selector={name}")
    return batch.selected


def _row_sum(x: Tensor, mask: Tensor) -> Tensor:
    """(B, 1) sum over the tokens of a reply."""
    return x.masked_fill(~mask, 0.0).sum(1, keepdim=True)


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, 1) mean over the tokens of a reply."""
    return _row_sum(x, mask) / mask.sum(1, keepdim=True).clamp_min(1)


LOSSES = {
    "ppo": ppo, "grpo": grpo, "surrogate": surrogate, "reinforce": reinforce, "gspo": gspo, "gmpo": gmpo,
    "cispo": cispo, "sapo": sapo, "dppo_tv": dppo_tv, "dppo_kl": dppo_kl, "topr": topr, "spo": spo, "vespo": vespo,
    "dual_clip": dual_clip, "top_entropy": top_entropy, "clip_cov": clip_cov, "kl_cov": kl_cov,
}


def token_weights(mask: Tensor, how: Literal["token", "sequence", "constant"], max_tokens: int,
        totals: tuple[int, int] | None = None) -> Tensor:
    """(B, T) weights w such that the loss is (w · per_token)[mask].sum(), for any way of cutting B into micro-batches.

    token: every token counts the same (PPO; DAPO);  sequence: every reply counts the same (GRPO);
    constant: every token, over a fixed length (Dr. GRPO).  `totals` = (rows, tokens) of the whole optimizer step over
    all ranks, where this mask is only a part of it. A row without a token does not count. ValueError on another `how`.
    """
    m = mask.to(torch.float32 if mask.device.type == "mps" else torch.float64)  # so that 1/n costs no precision
    rows, tokens = totals or (int(mask.any(1).sum()), int(mask.sum()))
    if how == "token":
        return m / max(tokens, 1)
    if how == "sequence":
        return m / m.sum(1, keepdim=True).clamp_min(1) / max(rows, 1)
    if how == "constant":
        return m / (max(rows, 1) * max_tokens)
    raise ValueError(f"weights {how!r}: choose token, sequence or constant")
