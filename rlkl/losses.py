"""Policy objectives: unreduced (B, T) losses and (B, T) diagnostics. train.py weights, adds the KL terms and reduces.

The keyword-only arguments of a loss are its options in YAML. A loss contains no KL to the reference, never divides by a
token count, and never compares rows. To add your own: a function like these, in any file, `loss.name=file.py:function`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlkl.types import Batch, Evaluation

Loss = tuple[Tensor, dict[str, Tensor]]


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi / pi_old per token, (B, T); the log-ratio is clamped to ±20 so that one broken token cannot overflow."""
    return (logprobs - old_logprobs).clamp(-20, 20).exp()


def clipped_surrogate(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(w A, clip(w, 1-low, 1+high) A) and w = pi/pi_old, (B, T) (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    The trust region: once w has moved past the clip in the direction A asks for, the token's gradient is zero.
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages), ratio


def clipped_tokens(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """(B, T) 1.0 where the clip killed the gradient: w beyond it in A's direction, not any |w - 1| > clip."""
    return ((ratio > 1 + high) & (advantages > 0) | (ratio < 1 - low) & (advantages < 0)).to(ratio.dtype)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²) / 2, (B, T), as in openai/baselines ppo2."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def ppo(new: Evaluation, batch: Batch, *, clip: float = 0.2, value_coef: float = 0.5, value_clip: float = 0.2,
        entropy_coef: float = 0.0) -> Loss:
    """Clipped surrogate + value loss - entropy bonus (Schulman et al. 2017, eq. 9). Weights: token."""
    if new.values is None or batch.values is None or batch.returns is None:
        raise ValueError("ppo needs a critic: set model.critic to head or network, and advantage.name to gae")
    policy, ratio = clipped_surrogate(new.logprobs, batch.old_logprobs, batch.advantages, clip, clip)
    value = clipped_value_loss(new.values, batch.values, batch.returns, value_clip)
    clipped = clipped_tokens(ratio, batch.advantages, clip, clip)
    stats = {"policy_loss": policy, "value_loss": value, "ratio": ratio, "clip_fraction": clipped}
    return policy + value_coef * value - entropy_coef * new.entropy, stats


def grpo(
    new: Evaluation, batch: Batch, *, clip: float = 0.2, clip_high: float | None = None, entropy_coef: float = 0.0
) -> Loss:
    """Clipped surrogate without a critic (Shao et al. 2024, arXiv:2402.03300, eq. 3, less its KL). Weights: sequence.

    `clip_high` widens the upper side only: DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476, eq. 10).
    """
    high = clip if clip_high is None else clip_high
    policy, ratio = clipped_surrogate(new.logprobs, batch.old_logprobs, batch.advantages, clip, high)
    clipped = clipped_tokens(ratio, batch.advantages, clip, high)
    stats = {"policy_loss": policy, "ratio": ratio, "clip_fraction": clipped}
    return policy - entropy_coef * new.entropy, stats


def surrogate(new: Evaluation, batch: Batch, *, entropy_coef: float = 0.0) -> Loss:
    """-w A, unclipped; with kl_old it is PPO-penalty (Schulman et al. 2017, eq. 6 and 8). Weights: token."""
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    policy = -ratio * batch.advantages
    return policy - entropy_coef * new.entropy, {"policy_loss": policy, "ratio": ratio}


LOSSES = {"ppo": ppo, "grpo": grpo, "surrogate": surrogate}


def token_weights(
    mask: Tensor, how: Literal["token", "sequence", "constant"], max_tokens: int, totals: tuple[int, int] | None = None
) -> Tensor:
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
