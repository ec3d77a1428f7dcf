"""The two KLs: estimators from samples, loss terms, and the rules that adapt a coefficient.

    kl_ref   between the current policy pi and the frozen reference. It decides where training ends.
             Reverse KL is KL(pi || ref).
    kl_old   between pi_old, which sampled this rollout, and pi, on samples of pi_old:
             KL(pi_old || pi). It is a trust region: it decides how far one rollout may move pi.

An estimator has a value *and* a gradient, and the two can estimate different things (Schulman 2020,
joschu.net/blog/kl-approx; Tang & Munos 2025, arXiv:2506.09477). Per token, in nats, with
u = log pi(a) - log ref(a) and a ~ pi:

    name   value                E[value]        as a loss, gradient of         in the reward: to
    k1     u                    KL(pi || ref)   nothing (zero)                 KL(pi || ref)
    k2     u²/2                 about KL        KL(pi || ref)                  not that: a trap
    k3     exp(-u) - 1 + u      KL(pi || ref)   KL(ref || pi): the *other*     not that: a trap
    exact  Σ_a pi log(pi/ref)   KL(pi || ref)   KL(pi || ref)                  nothing: refused

As a loss on each token, these gradients are right at that token, but gradients through future
states are dropped: a token gets no credit for the KL it causes later. Only `wk3_prefix`,
`k2_sequence`, `rao_blackwell`, and k1 in the reward have the gradient of the KL of whole
*sequences*.
"""

from __future__ import annotations

from torch import Tensor

from rlkl.losses.clip import clamped_exp, importance_ratio
from rlkl.types import Batch, PolicyOutput

# ------------------------------------------------------------------ estimators: KL as a number


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log ref, (B, T) nats: unbiased, high variance, any sign. The one for the reward."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log ref)² / 2, (B, T) nats: biased by O(u³), low variance."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref/pi - 1 - log(ref/pi), (B, T) nats: unbiased, never negative.

    Its tail is heavy where pi << ref. There the log-ratio is clamped at 20 in both terms, so that
    the gradient is 0 beyond it and never points the wrong way.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(max=20)
    return log_ratio.clamp(min=-20).expm1() - log_ratio


KL = {"k1": k1, "k2": k2, "k3": k3}


# ------------------------------------------------------------------ kl_ref as a loss term
# Unless the docstring says "for any pi_old", the samples must come from pi itself (pi_old = pi).


def ref_k2(new: PolicyOutput, batch: Batch) -> Tensor:
    """k2 to the reference, (B, T): its expected gradient is that of KL(pi || ref) at each token."""
    return k2(new.logprobs, batch.ref_logprobs)


def ref_k3(new: PolicyOutput, batch: Batch) -> Tensor:
    """k3 to the reference, (B, T) (GRPO, arXiv:2402.03300, eq. 4).

    Its expected gradient is that of KL(ref || pi), the other direction.
    """
    return k3(new.logprobs, batch.ref_logprobs)


def ref_k3_straight_through(new: PolicyOutput, batch: Batch) -> Tensor:
    """The value of k3 with the gradient of k2, that of KL(pi || ref) per token (verl's `k3+`)."""
    value = ref_k3(new, batch)
    gradient = ref_k2(new, batch)
    return gradient - gradient.detach() + value.detach()


def wk3_token(new: PolicyOutput, batch: Batch) -> Tensor:
    """w_t · k3_t with w = pi/pi_old differentiable: KL(pi || ref) at each token, for any pi_old.

    DeepSeek-V3.2, arXiv:2512.02556.
    """
    return importance_ratio(new.logprobs, batch.old_logprobs) * ref_k3(new, batch)


def wk2_token(new: PolicyOutput, batch: Batch) -> Tensor:
    """w_t · k2_t with w differentiable: the gradient of E_pi[u²]/2, which is not a KL.

    Included only so that the configuration check can name it.
    """
    return importance_ratio(new.logprobs, batch.old_logprobs) * ref_k2(new, batch)


def wk3_prefix(new: PolicyOutput, batch: Batch) -> Tensor:
    """w_1 ··· w_t · k3_t, differentiable: the exact gradient of the *sequence's* KL(pi || ref).

    For any pi_old. A token is charged for the KL of all that follows it; the price is the variance
    of the product.
    """
    log_ratio = (new.logprobs - batch.old_logprobs).masked_fill(~batch.mask, 0.0)
    return clamped_exp(log_ratio.cumsum(1)) * ref_k3(new, batch)


def k2_sequence(new: PolicyOutput, batch: Batch) -> Tensor:
    """(Σ_t u_t)² / 2 of the whole response: the gradient of the sequence's KL(pi || ref).

    The square of the sum, not the sum of the squares. It is spread over the tokens as
    sg(Σ u) · u_t, sg = stop gradient.
    """
    u = k1(new.logprobs, batch.ref_logprobs).masked_fill(~batch.mask, 0.0)
    return u.detach().sum(1, keepdim=True) * u


def exact_pi_ref(new: PolicyOutput, batch: Batch) -> Tensor:
    """KL(pi || ref) over the whole vocabulary at each sampled state: no noise from the action."""
    return new.kl_pi_ref


def exact_ref_pi(new: PolicyOutput, batch: Batch) -> Tensor:
    """KL(ref || pi) over the whole vocabulary: what k3 as a loss estimates the gradient of."""
    return new.kl_ref_pi


def rao_blackwell(new: PolicyOutput, batch: Batch) -> Tensor:
    """w_1 ··· w_{t-1} · KL(pi || ref)(s_t), w differentiable: the *sequence's* KL, for any pi_old.

    The exact KL with credit for the KL of what follows, and the least variance of all (Amini et al.
    2025, arXiv:2504.10637).
    """
    log_ratio = (new.logprobs - batch.old_logprobs).masked_fill(~batch.mask, 0.0)
    return clamped_exp(log_ratio.cumsum(1) - log_ratio) * new.kl_pi_ref


KL_LOSSES = {  # kl_ref.place = loss
    "k2": ref_k2,
    "k3": ref_k3,
    "k3+": ref_k3_straight_through,
    "k2_sequence": k2_sequence,
    "wk2_token": wk2_token,
    "wk3_token": wk3_token,
    "wk3_prefix": wk3_prefix,
    "exact_pi_ref": exact_pi_ref,
    "exact_ref_pi": exact_ref_pi,
    "rao_blackwell": rao_blackwell,
}


# ------------------------------------------------------------------ kl_old as a loss term


def old_k2(new: PolicyOutput, batch: Batch) -> Tensor:
    """k2 to pi_old, (B, T), on samples of pi_old: equal to KL(pi_old || pi) to second order."""
    return k2(batch.old_logprobs, new.logprobs)


def old_k3(new: PolicyOutput, batch: Batch) -> Tensor:
    """w - 1 - log w with w = pi/pi_old, (B, T): unbiased in value and gradient."""
    return k3(batch.old_logprobs, new.logprobs)


KL_OLD_LOSSES = {"k2": old_k2, "k3": old_k3}


# ------------------------------------------------------------------ how far policies are apart


def policy_divergences(logprobs: Tensor, batch: Batch) -> dict[str, Tensor]:
    """(B, T) each: how far pi (logprobs) is from pi_old, and pi_old from reference and sampler.

    kl_old_pi, kl_sampler_old, kl_pi_ref_token (of pi_old, which is pi as it sampled): nats,
    estimated per token. ratio_mean, ratio_square: w = pi/pi_old and w². sampler_gap: |log pi_old -
    log sampler|. ref_logprob: log-prob of the token under the reference. They are averaged over
    tokens, but of those whose name ends in `_max` the largest is taken.
    """
    old, sampler = batch.old_logprobs, batch.sampler_logprobs
    ratio = importance_ratio(logprobs, old)
    sampler_gap = (old - sampler).abs()
    divergences = {
        "kl_old_pi": k3(old, logprobs),
        "ratio_mean": ratio,
        "ratio_square": ratio.square(),
        "ratio_max": ratio,
        "kl_sampler_old": k3(sampler, old),
        "sampler_gap": sampler_gap,
        "sampler_gap_max": sampler_gap,
    }
    if batch.ref_logprobs is not None:
        divergences["kl_pi_ref_token"] = k1(old, batch.ref_logprobs)
        divergences["ref_logprob"] = batch.ref_logprobs
    return divergences


# ------------------------------------------------------------------ adaptive coefficients


def proportional(coef: float, target: float, kl: float, rows: int, horizon: int) -> float:
    """The next kl_ref coefficient: coef · (1 + clip(kl/target - 1, ±0.2) · rows/horizon).

    kl and target in nats per *sequence*. Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * rows / horizon)


def doubling(coef: float, target: float, kl: float) -> float:
    """The next kl_old coefficient: half below target/1.5, double above 1.5 · target.

    kl and target in nats per *token*. PPO-penalty, Schulman et al. 2017, arXiv:1707.06347, sec. 4.
    """
    if kl < target / 1.5:
        return coef * 0.5
    if kl > 1.5 * target:
        return coef * 2.0
    return coef


# ------------------------------------------------------------------ refused, and warned of
# By (kl_ref.place, kl_ref.estimator).

_A_BASELINE = (
    "the KL of a state is the same whatever is sampled there, so as a reward it is only a baseline "
    "and does not constrain the policy"
)
REFUSED = {
    ("loss", "k1"): "its expected gradient is zero, so it would not constrain the policy at all",
    ("reward", "exact_pi_ref"): _A_BASELINE,
    ("reward", "exact_ref_pi"): _A_BASELINE,
    ("reward", "rao_blackwell"): _A_BASELINE,
}
_RUNAWAY = (
    "in the reward does not lead to the optimum of E[score] - coef · KL(pi || ref): the "
    "probability of tokens below ref runs away to 0; use k1"
)
TRAPS = {
    ("reward", "k2"): f"k2 {_RUNAWAY}",
    ("reward", "k3"): f"k3 {_RUNAWAY}",
    ("loss", "k3"): (
        "k3 in the loss has the gradient of KL(ref || pi), the other direction; k2 has that of "
        "KL(pi || ref)"
    ),
    ("loss", "wk2_token"): (
        "w·k2 has the gradient of E[u²]/2, which is not a KL; wk3_token has that of KL(pi || ref)"
    ),
}
