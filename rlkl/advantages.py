"""Credit assignment: token rewards (B, T) → advantages (B, T), zero outside the mask, and value targets (B, T) or None.

`rewards` already holds all that is paid: the score on the last token, -coef·KL on every token if KL is in the reward.
Masked tokens do not exist in time: values and λ-sums are carried *through* them. A row without a token does not exist
at all: its group is as large as the rows that have one.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Credit = tuple[Tensor, Tensor | None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, group_size: int = 1, gamma: float = 1.0, lam: float = 0.95,
        lam_critic: float | None = None, lam_alpha: float = 0.0, whiten: bool = True) -> Credit:
    """Generalised advantage estimation, one reply = one episode (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    A_t = δ_t + γλ A_{t+1},  δ_t = r_t + γ V_{t+1} - V_t,  V after the last token = 0; returns = A + V.
    Advantages are whitened afterwards.
    `lam_critic` gives the value targets a λ of their own (VC-PPO, Yuan et al. 2025, arXiv:2503.01491).
    `lam_alpha` > 0 replaces `lam` by 1 - 1/(lam_alpha · length), at least 0 (VAPO, Yue et al. 2025, arXiv:2504.05118).
    """
    if values is None:
        raise ValueError("gae needs a critic: set model.critic to head or network")
    lams = 1 - 1 / (lam_alpha * mask.sum(1)).clamp_min(1) if lam_alpha else lam
    advantages = _gae(rewards, values, mask, gamma, lams)
    targets = advantages if lam_critic is None else _gae(rewards, values, mask, gamma, lam_critic)
    returns = (targets + values).masked_fill(~mask, 0.0)
    return (whitened(advantages, mask) if whiten else advantages), returns


def _gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    next_value, running, columns = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for r, v, m in zip(rewards.flip(1).unbind(1), values.flip(1).unbind(1), mask.flip(1).unbind(1), strict=True):
        running = torch.where(m, r + gamma * next_value - v + gamma * lam * running, running)
        next_value = torch.where(m, v, next_value)
        columns.append(torch.where(m, running, 0.0))
    return torch.stack(columns[::-1], 1)


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean, unit variance over the mask: Bessel variance, rsqrt(var + 1e-8), zero outside the mask."""
    inside = x[mask]
    if len(inside) < 2:
        return torch.zeros_like(x)
    return ((x - inside.mean()) * (inside.var() + 1e-8).rsqrt()).masked_fill(~mask, 0.0)


def grpo(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int,
         scale: Literal["group", "batch"] = "group") -> Credit:
    """(R - mean) / (std + 1e-6) over the samples of a prompt, ddof 1 (Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2).

    scale = batch divides by the std over the whole rollout instead (Liu et al. 2025, arXiv:2508.08221).
    """
    returns, centred, there = _centred(rewards, mask, group_size)
    over = (returns, there) if scale == "group" else (returns.view(1, -1), there.view(1, -1))
    return _spread(centred / (_std(*over) + 1e-6), mask), None


def dr_grpo(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Credit:
    """R - mean over the samples of a prompt, no std (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783)."""
    return _spread(_centred(rewards, mask, group_size)[1], mask), None


def rloo(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Credit:
    """R - mean of the *other* samples = G/(G-1) · (R - mean) (RLOO, Ahmadian et al. 2024, arXiv:2402.14740)."""
    _, centred, there = _centred(rewards, mask, group_size)
    size = there.sum(1, keepdim=True).to(centred.dtype)
    return _spread(centred * (size / (size - 1).clamp_min(1)), mask), None


def opo(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Credit:
    """R - b, b = Σ_j l_j R_j / Σ_j l_j over the samples of a prompt (OPO, Hao et al. 2025, arXiv:2505.23585).

    l is the length. The baseline of least variance, if the squared norm of a reply's score function grows with it.
    """
    centred = _centred(rewards, mask, group_size)[1]
    lengths = rearrange(mask.sum(1), "(n g) -> n g", g=group_size)
    shift = (lengths * centred).sum(1, keepdim=True) / lengths.sum(1, keepdim=True).clamp_min(1)  # b - mean
    return _spread(centred - shift, mask), None


def maxrl(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Credit:
    """(R - mean) / mean over the samples of a prompt, 0 if none scored: ascends log p(correct) (arXiv:2602.02710).

    ValueError on negative scores, where the mean is no probability, and on a KL in the reward.
    """
    _refuse_token_rewards("maxrl", rewards, mask)
    returns, centred, there = _centred(rewards, mask, group_size)
    if (returns < 0).any():
        raise ValueError(f"maxrl divides by the mean score, so scores must be >= 0; one is {returns.min().item():.4g}")
    mean = returns.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
    return _spread(torch.where(mean > 0, centred / mean, 0.0), mask), None


def pass_at_k(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int, k: int = 2) -> Credit:
    """Of a set of k samples, which passes if one of them does: the mean advantage of the sets a reply is in.

    The analytic form (Chen et al. 2025, arXiv:2508.10751), W of the N samples wrong: p = 1 - C(W,k)/C(N,k),
    σ² = p(1-p), A = (1-p)/σ if right, (1-p - C(W-1,k-1)/C(N-1,k-1))/σ if wrong; 0 where every set, or none, passes.
    ValueError on scores other than 0 and 1, and on a KL in the reward.
    """
    if not 1 <= k <= max(group_size, 2):
        raise ValueError(f"pass_at_k needs 1 <= k <= group_size; k is {k}, group_size {group_size}")
    _refuse_token_rewards("pass_at_k", rewards, mask)
    right, _, there = _centred(rewards, mask, group_size)
    if (odd := right[(right != 0) & (right != 1)]).numel():
        raise ValueError(f"pass_at_k needs scores of 0 (wrong) or 1 (right); one is {odd[0].item():.4g}")
    size = there.sum(1, keepdim=True)
    wrong = size - right.sum(1, keepdim=True)
    fails = _all_wrong(wrong, size, k)
    fails_with_me = _all_wrong(wrong - 1, size - 1, k - 1)
    std = (fails * (1 - fails)).sqrt()
    advantages = torch.where(right == 1, fails, fails - fails_with_me) / std
    return _spread(advantages.masked_fill(std == 0, 0.0), mask), None


def best_only(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Credit:
    """R_(1) - R_(2) for the best reply of a prompt, 0 for the others: max@G (Tang et al. 2025, arXiv:2503.19595).

    The leave-one-out advantage of the group's best score; 0 for a group whose best two are equal.
    """
    returns, _, there = _centred(rewards, mask, group_size)
    if group_size < 2:
        return _spread(torch.zeros_like(returns), mask), None
    best = returns.masked_fill(~there, -torch.inf).topk(2, dim=1)
    margin = (best.values[:, :1] - best.values[:, 1:]).masked_fill(there.sum(1, keepdim=True) < 2, 0.0)
    return _spread(torch.zeros_like(returns).scatter(1, best.indices[:, :1], margin), mask), None


def _all_wrong(wrong: Tensor, total: Tensor, k: int) -> Tensor:
    """C(wrong, k) / C(total, k): k draws without replacement are all among the wrong ones."""
    drawn = torch.arange(k, device=wrong.device)
    return ((wrong[..., None] - drawn).clamp_min(0) / (total[..., None] - drawn).clamp_min(1)).prod(-1)


def _refuse_token_rewards(name: str, rewards: Tensor, mask: Tensor) -> None:
    """A KL in the reward shows as pay on tokens that are not the last of their row."""
    early = mask & (mask.flip(1).cumsum(1).flip(1) > 1)
    if rewards[early].any():
        raise ValueError(f"{name} takes one score per reply, but tokens before the last are paid too, as by a KL in "
            "the reward: set kl_ref.place=loss or kl_ref.coef=0")


def reinforce_pp(
    rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int = 1, gamma: float = 1.0
) -> Credit:
    """Return-to-go Σ_s γ^(s-t) r_s, whitened over all tokens (REINFORCE++, Hu 2025, arXiv:2501.03262)."""
    return whitened(_gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0), mask), None


def reinforce_pp_baseline(rewards: Tensor, values: Tensor | None, mask: Tensor, *, group_size: int) -> Credit:
    """R - mean over the samples of a prompt, whitened over all tokens (Hu 2025, arXiv:2501.03262).

    Whitening shifts all tokens until their mean is 0; a unanimous group, which tells nothing, is 0 all the same.
    """
    centred = _centred(rewards, mask, group_size)[1]
    informative = _spread(centred.ne(0).any(1, keepdim=True).expand_as(centred), mask)
    return whitened(_spread(centred, mask), mask).masked_fill(~informative, 0.0), None


def remax(rewards: Tensor, values: Tensor, mask: Tensor, *, group_size: int = 1) -> Credit:
    """Return-to-go minus the greedy reply's score, which `values` holds (ReMax, Li et al. 2024, arXiv:2310.10505)."""
    if values is None:
        raise ValueError("remax needs a baseline: the score of each prompt's greedy reply, in `values`")
    to_go = _gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    return (to_go - values).masked_fill(~mask, 0.0), None


def _centred(rewards: Tensor, mask: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n g) summed rewards, their deviation from the group's mean, and which rows are there: those with a token.

    The deviation is exactly 0 in a unanimous group, and in a row that is not there.
    """
    if len(mask) % group_size:
        raise ValueError(f"{len(mask)} rows do not divide into groups of {group_size}")
    summed = rewards.masked_fill(~mask, 0.0).sum(1), mask.any(1)
    returns, there = (rearrange(x, "(n g) -> n g", g=group_size) for x in summed)
    highest, lowest = (returns.masked_fill(~there, x) for x in (-torch.inf, torch.inf))
    unanimous = highest.amax(1, keepdim=True) <= lowest.amin(1, keepdim=True)  # the std of equal floats is not 0
    mean = returns.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
    return returns, (returns - mean).masked_fill(unanimous | ~there, 0.0), there


def _std(x: Tensor, there: Tensor) -> Tensor:
    """(n, g) → (n, 1), ddof 1, over the rows that are there; the others are given their mean, which adds nothing."""
    size = there.sum(1, keepdim=True).to(x.dtype)
    filled = torch.where(there, x, x.sum(1, keepdim=True) / size.clamp_min(1))
    others = x.shape[1] - 1  # 0: a group of one, whose std is 0 here
    return filled.std(1, correction=min(others, 1), keepdim=True) * (others / (size - 1).clamp_min(1)).sqrt()


def _spread(per_row: Tensor, mask: Tensor) -> Tensor:
    """(n g) one number per reply → (B, T) on each of its tokens."""
    return rearrange(per_row, "n g -> (n g) 1").expand(mask.shape).masked_fill(~mask, 0.0)


ADVANTAGES = {
    "gae": gae, "grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "opo": opo, "maxrl": maxrl, "pass_at_k": pass_at_k,
    "best_only": best_only,
    "reinforce_pp": reinforce_pp, "reinforce_pp_baseline": reinforce_pp_baseline, "remax": remax,
}
