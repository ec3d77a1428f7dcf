"""The two KLs: estimators from samples, loss terms, and the rules that adapt a coefficient.

`kl_ref` is between the current policy pi and the **frozen reference**; reverse KL is KL(pi || ref).
`kl_old` is between the policy that sampled, pi_old, and the current one, on samples of pi_old: KL(pi_old || pi).

An estimator has a value *and* a gradient, which answer different questions (Schulman 2020, joschu.net/blog/kl-approx;
Tang & Munos 2025, arXiv:2506.09477). With u = log pi(a) - log ref(a), a ~ pi, per token and in nats:

    name   value                  E[value]        as a loss, E[gradient] is that of     in the reward it leads to
    k1     u                      KL(pi || ref)   nothing (zero)                        KL(pi || ref)
    k2     u²/2                   about KL        KL(pi || ref)                         something else: a trap
    k3     exp(-u) - 1 + u        KL(pi || ref)   KL(ref || pi), the *other* direction  something else: a trap
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


def wk3_prefix(new: Evaluation, batch: Batch) -> Tensor:
    """w_1 ··· w_t · k3_t, differentiable: the exact gradient of the *sequence's* KL(pi || ref), for any pi_old.

    A token is charged for the KL of all that follows it; the price is the variance of the product.
    """
    prefix = (new.logprobs - batch.old_logprobs).masked_fill(~batch.mask, 0.0).cumsum(1)
    return prefix.clamp(-20, 20).exp() * ref_k3(new, batch)


def k2_sequence(new: Evaluation, batch: Batch) -> Tensor:
    """(Σ_t u_t)² / 2 of the whole reply, spread over its tokens as sg(Σ u) · u_t: on-policy the gradient of the
    sequence's KL(pi || ref). The square of the sum, not the sum of the squares.
    """
    u = k1(new.logprobs, batch.ref_logprobs).masked_fill(~batch.mask, 0.0)
    return u.detach().sum(1, keepdim=True) * u


def old_k2(new: Evaluation, batch: Batch) -> Tensor:
    """k2 to pi_old, with samples of pi_old: second-order equal to KL(pi_old || pi)."""
    return k2(batch.old_logprobs, new.logprobs)


def old_k3(new: Evaluation, batch: Batch) -> Tensor:
    """w - 1 - log w with w = pi/pi_old and samples of pi_old: value and gradient of KL(pi_old || pi), both unbiased."""
    return k3(batch.old_logprobs, new.logprobs)


KL_LOSSES = {  # kl_ref.place = loss
    "k2": ref_k2, "k3": ref_k3, "k3+": ref_k3_straight_through,
    "wk3_token": wk3_token, "wk3_prefix": wk3_prefix, "k2_sequence": k2_sequence,
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


# What an estimator does in a place where it does not do what it says (place, estimator); the first kind is refused.
REFUSED = {("loss", "k1"): "its expected gradient is zero, so it would not hold the policy at all"}
TRAPS = {("reward", "k2"): "k2 in the reward does not lead to the policy that KL(pi || ref) would; k1 does",
    ("reward", "k3"): "k3 in the reward does not lead to the policy that KL(pi || ref) would; k1 does", ("loss",
    "k3"): "k3 in the loss has the gradient of KL(ref || pi), the other direction; k2 has that of KL(pi || ref)"}
