"""The two KLs: estimators from samples, loss terms, and the rules that adapt a coefficient.

`kl_ref` is between the current policy pi and the **frozen reference**; reverse KL is KL(pi || ref).
`kl_old` is between the policy that sampled, pi_old, and the current one, on samples of pi_old: KL(pi_old || pi).

An estimator has a value *and* a gradient, which answer different questions (Schulman 2020, joschu.net/blog/kl-approx;
Tang & Munos 2025, arXiv:2506.09477). With u = log pi(a) - log ref(a), a ~ pi, per token and in nats:

    name   value                  E[value]        as a loss, E[gradient] is that of     in the reward it leads to
    k1     u                      KL(pi || ref)   nothing (zero)                        KL(pi || ref)
    k2     u²/2                   about KL        KL(pi || ref)                         something else: a trap
    k3     exp(-u) - 1 + u        KL(pi || ref)   KL(ref || pi), the *other* direction  something else: a trap
    exact  Σ_a pi log(pi/ref)     KL(pi || ref)   KL(pi || ref)                         nothing: refused

A term at each token is right there, but what a token leads into is charged to nobody: only `wk3_prefix`, `k2_sequence`,
`rao_blackwell`, and k1 in the reward, have the gradient of the *sequence's* KL. `rlkl explain` measures all this.
"""

from __future__ import annotations

from torch import Tensor

from rlkl.types import Batch, Evaluation


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log ref, (B, T) nats: unbiased, high variance, any sign. The right one in the reward."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log ref)² / 2, (B, T) nats: biased by O(u³), low variance."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref/pi - 1 - log(ref/pi), (B, T) nats: unbiased, never negative, heavy-tailed where pi << ref."""
    log_ratio = (ref_logprobs - logprobs).clamp(max=20)  # of both terms: past it the gradient is 0, never the wrong way
    return log_ratio.clamp(min=-20).expm1() - log_ratio


KL = {"k1": k1, "k2": k2, "k3": k3}


# Loss terms, (B, T). Where nothing else is said the samples must come from pi itself: pi_old = pi, the first update.
def ref_k2(new: Evaluation, batch: Batch) -> Tensor:
    """k2 to the reference: on-policy, its expected gradient is that of KL(pi || ref) at each token."""
    return k2(new.logprobs, batch.ref_logprobs)


def ref_k3(new: Evaluation, batch: Batch) -> Tensor:
    """k3 to the reference (GRPO, Shao et al. 2024, eq. 4): its expected gradient is that of KL(ref || pi)."""
    return k3(new.logprobs, batch.ref_logprobs)


def ref_k3_straight_through(new: Evaluation, batch: Batch) -> Tensor:
    """The value of k3 with the gradient of k2, that of KL(pi || ref) at each token (verl's `k3+`)."""
    value, gradient = ref_k3(new, batch), ref_k2(new, batch)
    return gradient - gradient.detach() + value.detach()


def wk3_token(new: Evaluation, batch: Batch) -> Tensor:
    """w_t · k3_t, w = pi/pi_old differentiable: right at each token, any pi_old (DeepSeek-V3.2, arXiv:2512.02556)."""
    return (new.logprobs - batch.old_logprobs).clamp(-20, 20).exp() * ref_k3(new, batch)


def wk2_token(new: Evaluation, batch: Batch) -> Tensor:
    """w_t · k2_t, w differentiable: the gradient of E_pi[u²]/2, which is no KL. Here to be warned of."""
    return (new.logprobs - batch.old_logprobs).clamp(-20, 20).exp() * ref_k2(new, batch)


def wk3_prefix(new: Evaluation, batch: Batch) -> Tensor:
    """w_1 ··· w_t · k3_t, differentiable: the exact gradient of the *sequence's* KL(pi || ref), for any pi_old.

    A token is charged for the KL of all that follows it; the price is the variance of the product.
    """
    log_ratio = (new.logprobs - batch.old_logprobs).masked_fill(~batch.mask, 0.0)
    return log_ratio.cumsum(1).clamp(-20, 20).exp() * ref_k3(new, batch)


def k2_sequence(new: Evaluation, batch: Batch) -> Tensor:
    """(Σ_t u_t)² / 2 of the whole reply, spread over its tokens as sg(Σ u) · u_t: on-policy the gradient of the
    sequence's KL(pi || ref). The square of the sum, not the sum of the squares.
    """
    u = k1(new.logprobs, batch.ref_logprobs).masked_fill(~batch.mask, 0.0)
    return u.detach().sum(1, keepdim=True) * u


def exact_pi_ref(new: Evaluation, batch: Batch) -> Tensor:
    """KL(pi || ref) over the whole vocabulary at each state: no sampling noise, but states are taken as they came."""
    return new.kl_pi_ref


def exact_ref_pi(new: Evaluation, batch: Batch) -> Tensor:
    """KL(ref || pi) over the whole vocabulary at each state: what k3 as a loss estimates the gradient of."""
    return new.kl_ref_pi


def rao_blackwell(new: Evaluation, batch: Batch) -> Tensor:
    """w_1 ··· w_{t-1} · KL(pi || ref)(s_t), w differentiable: the *sequence's* KL(pi || ref), for any pi_old.

    The exact KL with credit for the KL of what follows; the least variance (Amini et al. 2025, arXiv:2504.10637).
    """
    log_ratio = (new.logprobs - batch.old_logprobs).masked_fill(~batch.mask, 0.0)
    return (log_ratio.cumsum(1) - log_ratio).clamp(-20, 20).exp() * new.kl_pi_ref


def old_k2(new: Evaluation, batch: Batch) -> Tensor:
    """k2 to pi_old, with samples of pi_old: second-order equal to KL(pi_old || pi)."""
    return k2(batch.old_logprobs, new.logprobs)


def old_k3(new: Evaluation, batch: Batch) -> Tensor:
    """w - 1 - log w with w = pi/pi_old and samples of pi_old: value and gradient of KL(pi_old || pi), both unbiased."""
    return k3(batch.old_logprobs, new.logprobs)


KL_LOSSES = {  # kl_ref.place = loss
    "k2": ref_k2, "k3": ref_k3, "k3+": ref_k3_straight_through, "k2_sequence": k2_sequence,
    "wk2_token": wk2_token, "wk3_token": wk3_token, "wk3_prefix": wk3_prefix,
    "exact_pi_ref": exact_pi_ref, "exact_ref_pi": exact_ref_pi, "rao_blackwell": rao_blackwell,
}
KL_OLD_LOSSES = {"k2": old_k2, "k3": old_k3}  # kl_old


def proportional(coef: float, target: float, kl: float, rows: int, horizon: int) -> float:
    """coef · (1 + clip(kl/target - 1, ±0.2) · rows/horizon); Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2.

    kl and target in nats per *sequence*.
    """
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * rows / horizon)


def doubling(coef: float, target: float, kl: float) -> float:
    """Half below target/1.5, double above 1.5 target; PPO-penalty (Schulman et al. 2017, arXiv:1707.06347, sec. 4).

    kl and target in nats per *token*.
    """
    return coef * (0.5 if kl < target / 1.5 else 2.0 if kl > 1.5 * target else 1.0)


# What an estimator does where it does not do what it says, by (place, estimator). The first are refused.
A_BASELINE = "the KL of a state is the same whatever is sampled there: as a reward it is a baseline, and holds nothing"
REFUSED = {
    ("loss", "k1"): "its expected gradient is zero, so it would not hold the policy at all",
    ("reward", "exact_pi_ref"): A_BASELINE,
    ("reward", "exact_ref_pi"): A_BASELINE,
    ("reward", "rao_blackwell"): A_BASELINE,
}
RUNAWAY = "in the reward does not lead to the policy that KL(pi || ref) does: actions below ref run away to 0; use k1"
TRAPS = {
    ("reward", "k2"): f"k2 {RUNAWAY}",
    ("reward", "k3"): f"k3 {RUNAWAY}",
    ("loss", "k3"): "k3 in the loss has the gradient of KL(ref || pi), the other one; k2 has that of KL(pi || ref)",
    ("loss", "wk2_token"): "w·k2 has the gradient of E[u²]/2, which is no KL; wk3_token has that of KL(pi || ref)",
}
