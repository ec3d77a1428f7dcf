"""Scores → token rewards → advantages: GAE, GRPO, RLOO and the others.

A response gets one score, paid on its last token. With the KL in the reward, every token also pays
coef · KL; `rewards` (B, T) holds the sum of both. An advantage function turns rewards into

    advantages (B, T)   how much better this token did than expected; zero outside the mask
    returns    (B, T)   the targets of the critic, or None where no critic is trained

Masked tokens do not exist in time: GAE carries values and λ-sums *through* them. A row without any
token does not exist at all: its group is as large as the number of rows that have one.

To add your own: a function like these in any file, `advantage.name=file.py:function`. Its
keyword-only arguments are its options, except `group_size`, which the loop gives.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Advantages = tuple[Tensor, Tensor | None]  # advantages, returns


# ------------------------------------------------------------------ scores → token rewards


def token_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """(B,) scores → (B, T) rewards: each score on the last sampled token of its response.

    That token is the EOS, unless the response was truncated. All other rewards are zero.
    """
    last = mask.long().cumsum(1).argmax(1, keepdim=True)  # the first column with the full count
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device)
    return rewards.scatter(1, last, scores[:, None]).masked_fill(~mask, 0.0)


# ------------------------------------------------------------------ with a critic


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    group_size: int = 1,
    gamma: float = 1.0,
    lam: float = 0.95,
    lam_critic: float | None = None,
    lam_alpha: float = 0.0,
    whiten: bool = True,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        A_t = δ_t + γλ A_{t+1},    δ_t = r_t + γ V_{t+1} - V_t,    returns = A + V

    One response is one episode: V after the last token is 0. With `whiten` the advantages are
    whitened afterwards.

    gamma: the discount γ.
    lam: the λ of the advantages, and of the returns unless lam_critic is set.
    lam_critic: a λ of its own for the returns (VC-PPO, Yuan et al. 2025, arXiv:2503.01491).
    lam_alpha: where > 0, λ = 1 - 1/(lam_alpha · length), at least 0 (VAPO, arXiv:2504.05118).
    Raises ValueError without values.
    """
    if values is None:
        raise ValueError("gae needs a critic: set critic.kind to head or network")
    lams = 1 - 1 / (lam_alpha * mask.sum(1)).clamp_min(1) if lam_alpha else lam
    advantages = _gae(rewards, values, mask, gamma, lams)
    targets = advantages if lam_critic is None else _gae(rewards, values, mask, gamma, lam_critic)
    returns = (targets + values).masked_fill(~mask, 0.0)
    return (whitened(advantages, mask) if whiten else advantages), returns


def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """(B, T) unwhitened GAE, from the last column to the first."""
    next_value = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(values[:, 0])
    columns = []
    backwards = (x.flip(1).unbind(1) for x in (rewards, values, mask))
    for r, v, m in zip(*backwards, strict=True):
        advantage = torch.where(m, r + gamma * next_value - v + gamma * lam * advantage, advantage)
        next_value = torch.where(m, v, next_value)
        columns.append(torch.where(m, advantage, 0.0))
    return torch.stack(columns[::-1], 1)


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) x with mean 0 and variance 1 over the mask, zero outside it.

    The variance is Bessel-corrected, the divisor sqrt(var + 1e-8).
    """
    inside = x[mask]
    if len(inside) < 2:
        return torch.zeros_like(x)
    scale = (inside.var() + 1e-8).rsqrt()
    return ((x - inside.mean()) * scale).masked_fill(~mask, 0.0)


# ------------------------------------------------------------------ with the group as a baseline


def grpo(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor,
    *,
    group_size: int,
    scale: Literal["group", "batch"] = "group",
) -> Advantages:
    """(R - mean) / (std + 1e-6) over the samples of a prompt (GRPO, arXiv:2402.03300, sec. 4.1.2).

    R is the sum of a response's rewards, the std has ddof 1.
    scale: batch divides by the std over the whole rollout instead (arXiv:2508.08221).
    """
    returns, centred, present = _centred(rewards, mask, group_size)
    if scale == "group":
        std = _std(returns, present)
    else:
        std = _std(rearrange(returns, "n g -> 1 (n g)"), rearrange(present, "n g -> 1 (n g)"))
    return _per_token(centred / (std + 1e-6), mask), None


def dr_grpo(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Advantages:
    """R - mean over the samples of a prompt, without the std (Dr. GRPO, arXiv:2503.20783)."""
    _, centred, _ = _centred(rewards, mask, group_size)
    return _per_token(centred, mask), None


def rloo(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Advantages:
    """R - mean of the *other* samples = G/(G-1) · (R - mean) (RLOO, arXiv:2402.14740)."""
    _, centred, present = _centred(rewards, mask, group_size)
    size = present.sum(1, keepdim=True).to(centred.dtype)
    return _per_token(centred * (size / (size - 1).clamp_min(1)), mask), None


def opo(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Advantages:
    """R - b with b = Σ_j l_j R_j / Σ_j l_j over the samples of a prompt (OPO, arXiv:2505.23585).

    l is the length. b is the baseline of least variance where the squared norm of a response's
    score function grows in proportion to its length.
    """
    _, centred, _ = _centred(rewards, mask, group_size)
    lengths = rearrange(mask.sum(1), "(n g) -> n g", g=group_size)
    # b - mean
    shift = (lengths * centred).sum(1, keepdim=True) / lengths.sum(1, keepdim=True).clamp_min(1)
    return _per_token(centred - shift, mask), None


def maxrl(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Advantages:
    """(R - mean) / mean over the samples of a prompt: ascends log p(correct) (arXiv:2602.02710).

    0 where no sample of the prompt scored. Raises ValueError on negative scores, where the mean is
    not a probability, and on a KL in the reward.
    """
    _refuse_token_rewards("maxrl", rewards, mask)
    returns, centred, present = _centred(rewards, mask, group_size)
    if (returns < 0).any():
        raise ValueError(
            "maxrl divides by the mean score, so scores must be >= 0; one is "
            f"{returns.min().item():.4g}"
        )
    mean = returns.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp_min(1)
    return _per_token(torch.where(mean > 0, centred / mean, 0.0), mask), None


def pass_at_k(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int, k: int = 2
) -> Advantages:
    """The advantage for pass@k: a set of k samples scores 1 if one of them is right.

    Each response gets the mean advantage of the sets it is in, in closed form (Chen et al. 2025,
    arXiv:2508.10751). With W of the N samples wrong, C the binomial coefficient:

        p = 1 - C(W,k) / C(N,k),    σ² = p (1 - p)
        A = (1 - p) / σ                               if the response is right
        A = (1 - p - C(W-1,k-1) / C(N-1,k-1)) / σ     if it is wrong

    0 where all sets pass, or none. Raises ValueError on scores other than 0 and 1, on a KL in the
    reward, and unless 1 <= k <= max(group_size, 2).
    """
    if not 1 <= k <= max(group_size, 2):
        raise ValueError(f"pass_at_k needs 1 <= k <= group_size; k is {k}, group_size {group_size}")
    _refuse_token_rewards("pass_at_k", rewards, mask)
    right, _, present = _centred(rewards, mask, group_size)
    if (odd := right[(right != 0) & (right != 1)]).numel():
        raise ValueError(
            f"pass_at_k needs scores of 0 (wrong) or 1 (right); one is {odd[0].item():.4g}"
        )
    size = present.sum(1, keepdim=True)
    wrong = size - right.sum(1, keepdim=True)
    fails = _all_wrong(wrong, size, k)
    fails_with_this = _all_wrong(wrong - 1, size - 1, k - 1)
    std = (fails * (1 - fails)).sqrt()
    advantages = torch.where(right == 1, fails, fails - fails_with_this) / std
    return _per_token(advantages.masked_fill(std == 0, 0.0), mask), None


def _all_wrong(wrong: Tensor, total: Tensor, k: int) -> Tensor:
    """C(wrong, k) / C(total, k): the chance that k draws without replacement are all wrong."""
    drawn = torch.arange(k, device=wrong.device)
    remaining_wrong = (wrong[..., None] - drawn).clamp_min(0)
    remaining = (total[..., None] - drawn).clamp_min(1)
    return (remaining_wrong / remaining).prod(-1)


def best_only(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int
) -> Advantages:
    """R_(1) - R_(2) for the best response of a prompt, 0 for the others (max@G, arXiv:2503.19595).

    This is the leave-one-out advantage of the group's best score. 0 where the best two are equal.
    """
    returns, _, present = _centred(rewards, mask, group_size)
    if group_size < 2:
        return _per_token(torch.zeros_like(returns), mask), None
    best = returns.masked_fill(~present, -torch.inf).topk(2, dim=1)
    alone = present.sum(1, keepdim=True) < 2
    margin = (best.values[:, :1] - best.values[:, 1:]).masked_fill(alone, 0.0)
    advantages = torch.zeros_like(returns).scatter(1, best.indices[:, :1], margin)
    return _per_token(advantages, mask), None


# ------------------------------------------------------------------ with other baselines


def reinforce_pp(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor,
    *,
    group_size: int = 1,
    gamma: float = 1.0,
) -> Advantages:
    """Return-to-go Σ_s γ^(s-t) r_s, whitened over all tokens (REINFORCE++, arXiv:2501.03262)."""
    to_go = _gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    return whitened(to_go, mask), None


def reinforce_pp_baseline(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int
) -> Advantages:
    """R - mean over the samples of a prompt, whitened over all tokens (arXiv:2501.03262).

    Whitening shifts all tokens until their mean is 0. A group of zero variance stays 0.
    """
    _, centred, _ = _centred(rewards, mask, group_size)
    differs = centred.ne(0).any(1, keepdim=True).expand_as(centred)
    advantages = whitened(_per_token(centred, mask), mask)
    return advantages.masked_fill(~_per_token(differs, mask), 0.0), None


def remax(rewards: Tensor, values: Tensor, mask: Tensor, *, group_size: int = 1) -> Advantages:
    """Return-to-go minus the score of the prompt's greedy response (ReMax, arXiv:2310.10505).

    values: (B, T), that score on every token; sampling.baseline=greedy computes it. Raises
    ValueError without it.
    """
    if values is None:
        raise ValueError("remax needs the score of each prompt's greedy response, in `values`")
    to_go = _gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    return (to_go - values).masked_fill(~mask, 0.0), None


# ------------------------------------------------------------------ groups


def _centred(rewards: Tensor, mask: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, G) each: the sum of a response's rewards, its deviation from the mean, is it present.

    A row is present if it has a token. The deviation is exactly 0 in a group of equal sums, where
    float arithmetic would leave a rounding error that the std then blows up.
    """
    if len(mask) % group_size:
        raise ValueError(f"{len(mask)} rows do not divide into groups of {group_size}")
    summed = rewards.masked_fill(~mask, 0.0).sum(1)
    returns = rearrange(summed, "(n g) -> n g", g=group_size)
    present = rearrange(mask.any(1), "(n g) -> n g", g=group_size)
    highest = returns.masked_fill(~present, -torch.inf).amax(1, keepdim=True)
    lowest = returns.masked_fill(~present, torch.inf).amin(1, keepdim=True)
    mean = returns.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp_min(1)
    deviation = (returns - mean).masked_fill((highest <= lowest) | ~present, 0.0)
    return returns, deviation, present


def _std(x: Tensor, present: Tensor) -> Tensor:
    """(N, G) → (N, 1) standard deviation with ddof 1 over the rows that are present.

    The absent rows take the mean of the others, which adds nothing to the sum of squares; the
    divisor is then corrected from G - 1 to the number present - 1.
    """
    size = present.sum(1, keepdim=True).to(x.dtype)
    filled = torch.where(present, x, x.sum(1, keepdim=True) / size.clamp_min(1))
    others = x.shape[1] - 1  # 0 for a group of one, whose std is 0 here
    std = filled.std(1, correction=min(others, 1), keepdim=True)
    return std * (others / (size - 1).clamp_min(1)).sqrt()


def _per_token(per_row: Tensor, mask: Tensor) -> Tensor:
    """(N, G) one number per response → (B, T) on each of its tokens."""
    return rearrange(per_row, "n g -> (n g) 1").expand(mask.shape).masked_fill(~mask, 0.0)


def _refuse_token_rewards(name: str, rewards: Tensor, mask: Tensor) -> None:
    """ValueError where a token before the last one is paid, as it is by a KL in the reward."""
    before_last = mask & (mask.flip(1).cumsum(1).flip(1) > 1)
    if rewards[before_last].any():
        raise ValueError(
            f"{name} takes one score per response, but tokens before the last are paid too, as by "
            "a KL in the reward: set kl_ref.place=loss or kl_ref.coef=0"
        )


ADVANTAGES = {
    "gae": gae,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "opo": opo,
    "maxrl": maxrl,
    "pass_at_k": pass_at_k,
    "best_only": best_only,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "remax": remax,
}
