"""KL estimators: value *and* gradient, both exact by enumerating a vocabulary in float64."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES, REFUSED, TRAPS, doubling, k1, k2, k3, proportional
from rlkl.logprobs import token_logprobs
from rlkl.types import Batch, Head, PolicyOutput

V, F64 = 7, torch.float64
P_NATS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
Q_NATS = torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64).log()


@pytest.fixture(params=range(3))
def policies(request):
    """Logits of pi (a leaf), log ref and log pi_old, over a vocabulary of 7, some way apart."""
    g = torch.Generator().manual_seed(request.param)
    logits = torch.randn(V, generator=g, dtype=torch.float64, requires_grad=True)
    ref, old = torch.randn(2, V, generator=g, dtype=torch.float64).log_softmax(-1)
    return logits, ref, old


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(P || Q) from log-probabilities: the definition."""
    return (p.exp() * (p - q)).sum()


def grad(x: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(x, leaf, retain_graph=True)[0]


def enumerated(pi: torch.Tensor, **fields: torch.Tensor) -> tuple[PolicyOutput, Batch]:
    """Every token of the vocabulary as one row with one token; the exact KLs by definition."""
    batch = plain_batch(torch.ones(V, 1, dtype=torch.bool), torch.zeros(V, 1))
    batch.fill(**{name: x[:, None] for name, x in fields.items()})
    new = PolicyOutput(pi[:, None], torch.zeros(V, 1))
    if "ref_logprobs" in fields:
        ref = fields["ref_logprobs"]
        both = kl(pi, ref), kl(ref, pi)
        new = new._replace(kl_pi_ref=both[0].expand(V, 1), kl_ref_pi=both[1].expand(V, 1))
    return new, batch


def plain_batch(mask: torch.Tensor, sampler: torch.Tensor) -> Batch:
    ids = mask.long()
    return Batch(ids, mask, ids, mask, sampler, torch.zeros(len(mask), dtype=torch.bool))


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-12)


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(policies, estimator):
    """E_pi[k] = KL(pi || ref)."""
    logits, ref, _ = policies
    pi = logits.log_softmax(-1)
    close((pi.exp() * estimator(pi, ref)).sum(), kl(pi, ref))


def test_k2_is_biased_by_a_third_order_term(policies):
    """With ref = softmax(log pi + h·direction) the bias grows as h³: 8 times for twice the h."""
    logits, ref, _ = policies
    pi = logits.detach().log_softmax(-1)

    def bias(h: float) -> float:
        near = (pi + h * (ref - pi)).log_softmax(-1)
        return float((pi.exp() * k2(pi, near)).sum() - kl(pi, near))

    assert bias(2e-3) / bias(1e-3) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_are_never_negative_and_zero_only_where_equal(estimator):
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    values = estimator(x, torch.zeros_like(x))
    assert (values[x != 0] > 0).all()
    assert estimator(x, x).eq(0).all()


def test_the_reference_example_in_nats():
    """P = [.4 .3 .2 .1], Q = [.3 .3 .3 .1]: KL(P||Q) = 0.03398, KL(Q||P) = 0.03533 nats."""
    for estimator in (k1, k3):
        forward = (P_NATS.exp() * estimator(P_NATS, Q_NATS)).sum()
        backward = (Q_NATS.exp() * estimator(Q_NATS, P_NATS)).sum()
        assert float(forward) == pytest.approx(0.033979807359, abs=5e-13)
        assert float(backward) == pytest.approx(0.035334910697, abs=5e-13)
        assert float(forward + backward) == pytest.approx(0.1 * math.log(2), abs=1e-14)
    assert float((P_NATS.exp() * k2(P_NATS, Q_NATS)).sum()) == pytest.approx(
        0.032992390351, abs=5e-13
    )


def test_the_spread_of_the_reference_example():
    """Standard deviations under P of k1, k2 and k3: k1 is the noisy one."""
    p = P_NATS.exp()
    for estimator, std in ((k1, 0.254618), (k2, 0.030787), (k3, 0.034651)):
        x = estimator(P_NATS, Q_NATS)
        assert float(((p * x.square()).sum() - (p * x).sum().square()).sqrt()) == pytest.approx(
            std, abs=5e-7
        )


def test_the_seed_check_in_every_unit_by_the_librarys_own_functions():
    """By E_P[k1], by E_P[k3] and by token_logprobs over the vocabulary.

    A public note claims 0.0915. That is wrong in nats, bits and hartleys, in either direction,
    symmetrised, and as a sum of |terms|.
    """
    eye, ids = Head(torch.eye(4, dtype=F64)), torch.tensor([2])
    stats = token_logprobs(P_NATS[None], eye, ids, ref_hidden=Q_NATS[None], ref_head=eye)
    for forward in (
        (P_NATS.exp() * k1(P_NATS, Q_NATS)).sum(),
        (P_NATS.exp() * k3(P_NATS, Q_NATS)).sum(),
        stats.kl_pi_ref[0],
    ):
        assert float(forward) == pytest.approx(0.033979807359, abs=5e-13)
        assert float(forward) / math.log(2) == pytest.approx(0.049022499567, abs=5e-13)
    assert float(stats.kl_ref_pi[0]) == pytest.approx(0.035334910697, abs=5e-13)
    assert float(stats.logprobs[0]) == pytest.approx(math.log(0.2), abs=1e-14)
    p, q = float(stats.kl_pi_ref[0]), float(stats.kl_ref_pi[0])
    terms = P_NATS.exp() * k1(P_NATS, Q_NATS)
    readings = [p, q, p + q, (p + q) / 2, float(terms.abs().sum()), float(terms.clamp(min=0).sum())]
    for unit in (1.0, math.log(2), math.log(10)):
        assert min(abs(x / unit - 0.0915) for x in readings) > 5e-3


# ------------------------------------------------------------------ gradients of loss terms
# On samples of pi: E_pi[∇ k], where the weights pi are not differentiated.


def expected_gradient(estimator, logits: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    pi = logits.log_softmax(-1)
    return grad((pi.exp().detach() * estimator(pi, ref)).sum(), logits)


def test_k1_as_a_loss_has_zero_expected_gradient(policies):
    logits, ref, _ = policies
    close(expected_gradient(k1, logits, ref), torch.zeros(V, dtype=torch.float64))
    assert ("loss", "k1") in REFUSED
    assert "k1" not in KL_LOSSES


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl(policies):
    logits, ref, _ = policies
    close(expected_gradient(k2, logits, ref), grad(kl(logits.log_softmax(-1), ref), logits))


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl(policies):
    """∇ KL(ref || pi), which is not ∇ KL(pi || ref)."""
    logits, ref, _ = policies
    pi = logits.log_softmax(-1)
    gradient = expected_gradient(k3, logits, ref)
    close(gradient, grad(kl(ref, pi), logits))
    assert (gradient - grad(kl(pi, ref), logits)).abs().max() > 0.01


def forward_kl(pi: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    return kl(ref, pi)


def half_square(pi: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """E_pi[u²]/2, which is not a KL."""
    return (pi.exp() * (pi - ref).square() / 2).sum()


TARGETS = {
    "k2": kl,
    "k3+": kl,
    "k3": forward_kl,
    "exact_pi_ref": kl,
    "exact_ref_pi": forward_kl,
    "rao_blackwell": kl,
    "wk2_token": half_square,
    "wk3_token": kl,
    "wk3_prefix": kl,
    "k2_sequence": kl,
}


@pytest.mark.parametrize("name", KL_LOSSES)
def test_reference_loss_terms_have_the_gradient_they_state(policies, name):
    logits, ref, _ = policies
    pi = logits.log_softmax(-1)
    new, batch = enumerated(pi, ref_logprobs=ref, old_logprobs=pi.detach())
    expected = (pi.exp().detach()[:, None] * KL_LOSSES[name](new, batch)).sum()
    close(grad(expected, logits), grad(TARGETS[name](pi, ref), logits))


@pytest.mark.parametrize(
    "name", ["wk2_token", "wk3_token", "wk3_prefix", "exact_pi_ref", "rao_blackwell"]
)
def test_of_one_token_these_have_their_gradient_whatever_policy_sampled(policies, name):
    """w is differentiable, or nothing is sampled: E_old[∇ term] is the same from any pi_old."""
    logits, ref, old = policies
    pi = logits.log_softmax(-1)
    new, batch = enumerated(pi, ref_logprobs=ref, old_logprobs=old)
    target = TARGETS[name](pi, ref)
    expected = (old.exp()[:, None] * KL_LOSSES[name](new, batch)).sum()
    close(grad(expected, logits), grad(target, logits))
    if name == "wk2_token":
        assert (grad(expected, logits) - grad(kl(pi, ref), logits)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["k2", "k3", "k3+", "k2_sequence"])
def test_of_one_token_these_are_right_on_policy_only(policies, name):
    logits, ref, old = policies
    pi = logits.log_softmax(-1)
    new, batch = enumerated(pi, ref_logprobs=ref, old_logprobs=old)
    expected = grad((old.exp()[:, None] * KL_LOSSES[name](new, batch)).sum(), logits)
    target = grad(TARGETS[name](pi, ref), logits)
    assert (expected - target).norm() > 0.1 * target.norm()


LAW = {  # a value f(u), and F with F'(x) = f'(log x)
    "k1": (k1, lambda x: x - 1),
    "k2": (k2, lambda x: x * x.log() - x + 1),
    "k3": (k3, lambda x: x - 1 - x.log()),
    "swapped k3": (lambda pi, ref: k3(ref, pi), lambda x: (x - 1).square() / 2),
    "abs": (lambda pi, ref: k1(pi, ref).abs(), lambda x: (x - 1).abs()),
}


@pytest.mark.parametrize("name", LAW)
def test_a_value_as_a_loss_descends_the_divergence_whose_derivative_it_has(name):
    """E_pi[∇ f(u)] = ∇ Σ ref F(pi/ref), F'(x) = f'(log x), for any f.

    Here: nothing, KL(pi || ref), KL(ref || pi), χ²/2 and twice the total variation.
    """
    f, big_f = LAW[name]
    g = torch.Generator().manual_seed(7)
    for _ in range(20):
        logits = torch.randn(V, generator=g, dtype=F64, requires_grad=True)
        ref = torch.randn(V, generator=g, dtype=F64).log_softmax(-1)
        divergence = (ref.exp() * big_f((logits.log_softmax(-1) - ref).exp())).sum()
        torch.testing.assert_close(
            expected_gradient(f, logits, ref), grad(divergence, logits), rtol=0, atol=1e-12
        )


def test_weighted_k3_and_weighted_k2_have_one_gradient_token_by_token():
    """∇(w k3) = sg(w) ∇k2 = w u ∇log pi, off-policy too: DeepSeek-V3.2's is k2 weighted by w."""
    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        policy, ref, old = torch.randn(3, V, generator=g, dtype=F64).log_softmax(-1)
        new, batch = enumerated(policy.requires_grad_(), ref_logprobs=ref, old_logprobs=old)
        weighted = grad(KL_LOSSES["wk3_token"](new, batch).sum(), policy)
        ratio = (policy - old).exp().detach()
        squares = ratio * grad(KL_LOSSES["k2"](new, batch).sum(), policy)
        scale = ratio * (1 + (ref - policy).detach().exp())  # of the terms that cancel
        assert ((weighted - squares).abs() / scale.clamp(min=1)).max() <= 1e-14
        torch.testing.assert_close(
            squares, (ratio * (policy - ref)).detach(), rtol=1e-13, atol=1e-15
        )


@pytest.mark.parametrize("name", ["exact_pi_ref", "exact_ref_pi", "rao_blackwell"])
def test_the_exact_kl_in_the_reward_is_a_baseline_and_is_refused(policies, name):
    """E_pi[KL(s) ∇log pi] = KL(s) E_pi[∇log pi] = 0: it would constrain nothing."""
    logits, ref, _ = policies
    pi = logits.log_softmax(-1)
    new, batch = enumerated(pi, ref_logprobs=ref, old_logprobs=pi.detach())
    paid = KL_LOSSES[name](new, batch).detach()[:, 0]
    assert paid.gt(0.01).all()
    close(grad((pi.exp().detach() * paid * pi).sum(), logits), torch.zeros(V, dtype=F64))
    assert ("reward", name) in REFUSED
    assert name not in KL


def test_old_k3_has_the_value_and_the_gradient_of_kl_old_pi_on_samples_of_old(policies):
    """E_old[w - 1 - log w] = KL(pi_old || pi), and so its gradient, however far pi_old is."""
    logits, _, old = policies
    pi = logits.log_softmax(-1)
    unused = torch.full((V,), 99.0, dtype=F64)
    new, batch = enumerated(pi, old_logprobs=old, ref_logprobs=unused)
    expected = (old.exp()[:, None] * KL_OLD_LOSSES["k3"](new, batch)).sum()
    close(expected, kl(old, pi))
    close(grad(expected, logits), grad(kl(old, pi), logits))


def test_old_k2_agrees_with_kl_old_pi_to_second_order(policies):
    """At pi_old + h·d: value h²·Fisher/2, gradient h·Fisher, as KL(pi_old || pi), up to O(h)."""
    logits, ref, _ = policies
    old, h = logits.detach().log_softmax(-1), 1e-4
    moved = (old + h * ref).requires_grad_()
    pi = moved.log_softmax(-1)
    new, batch = enumerated(pi, old_logprobs=old)
    expected = (old.exp()[:, None] * KL_OLD_LOSSES["k2"](new, batch)).sum()
    exact = kl(old, pi)
    assert float((expected / exact).detach()) == pytest.approx(1, abs=20 * h)
    expected_gradient, exact_gradient = grad(expected, moved), grad(exact, moved)
    assert (expected_gradient - exact_gradient).norm() < 20 * h * exact_gradient.norm()


@pytest.mark.parametrize("terms", [KL_LOSSES, KL_OLD_LOSSES], ids=["ref", "old"])
def test_loss_terms_vanish_with_their_gradient_where_the_policies_are_equal(policies, terms):
    logits, _, _ = policies
    pi = logits.log_softmax(-1)
    new, batch = enumerated(pi, old_logprobs=pi.detach(), ref_logprobs=pi.detach())
    for term in terms.values():
        assert term(new, batch).eq(0).all()
        assert grad(term(new, batch).sum(), logits).abs().max() < 1e-15


def test_loss_terms_read_the_policy_they_are_named_after(policies):
    """A reference that differs leaves kl_old alone, a pi_old that differs leaves kl_ref alone."""
    logits, ref, old = policies
    pi = logits.log_softmax(-1).detach()
    at_ref = enumerated(pi, old_logprobs=old, ref_logprobs=pi)
    at_old = enumerated(pi, old_logprobs=pi, ref_logprobs=ref)
    for term in KL_LOSSES.values():
        assert term(*at_ref).eq(0).all()
        assert term(*at_old).gt(0).all()
    for term in KL_OLD_LOSSES.values():
        assert term(*at_old).eq(0).all()
        assert term(*at_ref).gt(0).all()


def test_signatures():
    """An estimator takes two tensors of log-probs, a loss term a policy's output and a batch."""
    x = torch.randn(3, 5)
    for f in KL.values():
        assert list(inspect.signature(f).parameters) == ["logprobs", "ref_logprobs"]
        assert f(x, -x).shape == x.shape
    for f in (*KL_LOSSES.values(), *KL_OLD_LOSSES.values()):
        assert list(inspect.signature(f).parameters) == ["new", "batch"]
    assert set(KL) <= set(KL_LOSSES) | {name for place, name in REFUSED if place == "loss"}
    assert not set(REFUSED) & set(TRAPS)
    assert ("reward", "k1") not in TRAPS  # the default
    assert {("reward", "k2"), ("reward", "k3")} <= set(TRAPS)


# ------------------------------------------------------------------ extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite_in_value_and_gradient(dtype):
    for name, estimator in KL.items():
        logprobs = torch.tensor([-1e4, -100.0, -20.5, 20.5, 100.0, 1e4], dtype=dtype)
        logprobs.requires_grad_()
        value = estimator(logprobs, torch.zeros_like(logprobs))
        assert value.isfinite().all(), name
        assert grad(value.sum(), logprobs).isfinite().all(), name


def test_k3_at_the_clamp():
    """Within ±20 it is the formula to the last digits; beyond, the exponential stops growing."""
    for u in (-20.0, -3.0, 1e-6, 3.0, 20.0):
        got = k3(torch.tensor(u, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
        assert float(got) == pytest.approx(math.expm1(-u) + u, rel=1e-12, abs=0)
    zero = torch.zeros((), dtype=torch.float64)
    assert float(k3(zero - 500, zero)) <= math.expm1(20)
    # pi >> ref: u - 1, not clamped away
    assert float(k3(zero + 500, zero)) == pytest.approx(499, abs=1e-8)


def test_k3_of_tiny_log_ratios_is_exact_in_float32():
    """exp(x) - 1 - x cancels: at x = 1e-3 the naive formula is off by percents in float32."""
    x = torch.tensor(1e-3)
    assert float(k3(-x, torch.zeros(()))) == pytest.approx(5.001667e-7, rel=2e-3)


def test_the_gradient_of_k3_never_pushes_away_from_the_reference():
    """∂k3/∂log pi = 1 - exp(-u) has the sign of u, or is 0 beyond the clamp.

    Where pi << ref, a step must not lower log pi still further.
    """
    u = torch.tensor([-500.0, -21.0, -19.0, -1.0, 1.0, 19.0, 21.0, 500.0], dtype=F64)
    u.requires_grad_()
    slope = grad(k3(u, torch.zeros_like(u)).sum(), u)
    assert (slope * u >= 0).all()


# ------------------------------------------------------------------ adaptive coefficients


def test_proportional_to_the_digit():
    """coef (1 + clip(kl/target - 1, ±.2) rows/horizon): inside the clip, at it and beyond it."""
    factors = {6.0: 1.0, 6.6: 1.1, 5.4: 0.9, 7.2: 1.2, 4.8: 0.8, 1e9: 1.2, 0.0: 0.8}
    for measured, factor in factors.items():
        coef = proportional(0.15, 6.0, measured, rows=1000, horizon=1000)
        assert coef == pytest.approx(0.15 * factor, rel=1e-12), measured
    for measured, factor in ((60.0, 1.01024), (-60.0, 0.98976)):
        coef = proportional(0.15, 6.0, measured, rows=512, horizon=10000)
        assert coef == pytest.approx(0.15 * factor, rel=1e-12), measured


def test_doubling_to_the_digit():
    """Half below target/1.5, double above 1.5 target, unchanged between, both ends included."""
    coefs = {0.0199: 1.0, 0.02: 2.0, 0.03: 2.0, 0.045: 2.0, 0.0451: 4.0, 0.0: 1.0, 9.0: 4.0}
    for measured, coef in coefs.items():
        assert doubling(2.0, 0.03, measured) == coef, measured
    assert doubling(2.0, 0.03, -1.0) == 1.0


@settings(deadline=None, max_examples=60)
@given(
    coef=st.floats(1e-6, 10),
    target=st.floats(1e-3, 100),
    measured=st.floats(-10, 1000),
    rows=st.integers(1, 4096),
)
def test_controllers_move_towards_the_target_and_keep_the_sign(coef, target, measured, rows):
    for after in (
        proportional(coef, target, measured, rows=rows, horizon=10000),
        doubling(coef, target, measured),
    ):
        assert after > 0
        assert after <= coef if measured < target else after >= coef


# ------------------------------------------------------------------ the KL of whole responses
# On a tree of two tokens: every response is enumerated, weighted with its probability under pi_old.


def tree(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the first token, (A,), and of the second one given it, (A, A)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, generator=g, dtype=F64), torch.randn(3, 3, generator=g, dtype=F64)


def responses(root: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
    """(9, 2) log-probs of both tokens of every response."""
    return torch.stack(
        [root.log_softmax(-1).repeat_interleave(3), leaves.log_softmax(-1).reshape(-1)], 1
    )


def state_kls(
    p: tuple[torch.Tensor, torch.Tensor], q: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """(9, 2) KL(p || q) at the two states of every response: the root, after its first token."""
    root, leaves = (x.log_softmax(-1) for x in p)
    kls = [(x.exp() * (x - y.log_softmax(-1))).sum(-1) for x, y in ((root, q[0]), (leaves, q[1]))]
    return torch.stack([kls[0].expand(9), kls[1].repeat_interleave(3)], 1)


def gradients(term, seed: int, on_policy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The expected gradient of the term, and the gradient of the sequence's KL(pi || ref).

    The term is summed over the response, and its expectation is over pi_old.
    """
    params, reference = [x.requires_grad_() for x in tree(seed)], tree(seed + 100)
    pi, ref = responses(*params), responses(*reference)
    old = pi.detach() if on_policy else responses(*tree(seed + 200))
    exact = (pi.sum(1).exp() * (pi - ref).sum(1)).sum()
    batch = plain_batch(torch.ones(9, 2, dtype=torch.bool), old)
    batch.fill(old_logprobs=old, ref_logprobs=ref)
    new = PolicyOutput(
        pi,
        torch.zeros_like(pi),
        kl_pi_ref=state_kls(params, reference),
        kl_ref_pi=state_kls(reference, params),
    )
    expected = (old.sum(1).exp() * term(new, batch).sum(1)).sum()
    return flat_gradient(expected, params), flat_gradient(exact, params)


def flat_gradient(x: torch.Tensor, params: list[torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(x, params, retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize(
    ("name", "on_policy"),
    [
        ("wk3_prefix", True),
        ("wk3_prefix", False),
        ("rao_blackwell", True),
        ("rao_blackwell", False),
        ("k2_sequence", True),
    ],
)
def test_these_terms_have_the_gradient_of_the_kl_of_the_whole_response(name, on_policy):
    for seed in range(5):
        expected, exact = gradients(KL_LOSSES[name], seed, on_policy)
        torch.testing.assert_close(expected, exact, rtol=0, atol=1e-13)


# Other surrogates that are used off-policy, made of the library's k1.


def prefix_k1(new: PolicyOutput, batch: Batch) -> torch.Tensor:
    return (new.logprobs - batch.old_logprobs).cumsum(1).exp() * k1(
        new.logprobs, batch.ref_logprobs
    )


def weighted_square_of_the_sum(new: PolicyOutput, batch: Batch) -> torch.Tensor:
    weight = (new.logprobs - batch.old_logprobs).sum(1, keepdim=True).exp().detach()
    return weight * KL_LOSSES["k2_sequence"](new, batch)


def frozen_k1_to_go(new: PolicyOutput, batch: Batch) -> torch.Tensor:
    """k1 in the reward in PPO's second epoch: the policy moved, what was paid did not."""
    paid = k1(batch.old_logprobs, batch.ref_logprobs)
    return (new.logprobs - batch.old_logprobs).exp() * paid.flip(1).cumsum(1).flip(1)


def k1_without_ratio(new: PolicyOutput, batch: Batch) -> torch.Tensor:
    return k1(new.logprobs, batch.ref_logprobs)


EXACT = {
    "wk3_prefix": KL_LOSSES["wk3_prefix"],
    "rao_blackwell": KL_LOSSES["rao_blackwell"],
    "prefix k1": prefix_k1,
    "weighted square of the sum": weighted_square_of_the_sum,
}
WRONG = {name: f for name, f in KL_LOSSES.items() if name not in EXACT} | {
    "frozen k1 to go": frozen_k1_to_go,
    "k1 without ratio": k1_without_ratio,
}


def worst(term) -> float:
    """The largest relative error of the expected gradient of 20 random (pi, pi_old, ref)."""
    pairs = [gradients(term, seed, on_policy=False) for seed in range(20)]
    return max(float((expected - exact).norm() / exact.norm()) for expected, exact in pairs)


@pytest.mark.parametrize("name", EXACT)
def test_off_policy_these_surrogates_have_the_gradient_of_the_sequences_kl(name):
    assert worst(EXACT[name]) <= 1e-12


@pytest.mark.parametrize("name", WRONG)
def test_off_policy_these_surrogates_do_not(name):
    assert worst(WRONG[name]) > 0.5


@pytest.mark.parametrize(
    "name", ["k2", "k3", "k3+", "wk2_token", "wk3_token", "exact_pi_ref", "exact_ref_pi"]
)
def test_a_term_per_token_is_not_charged_for_the_kl_that_follows(name):
    """Gradients of per-token terms miss the KL that a token causes later, even on-policy."""
    got, want = gradients(KL_LOSSES[name], 0, on_policy=True)
    assert (got - want).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["k3+", "wk3_token", "k2", "exact_pi_ref"])
def test_at_the_last_token_these_have_the_gradient_of_the_exact_kl(name):
    """The leaves of the tree are bandits: there the gradient is right."""
    got, want = gradients(KL_LOSSES[name], 1, on_policy=True)
    torch.testing.assert_close(got[3:], want[3:], rtol=0, atol=1e-13)


def test_k3_plus_has_the_value_of_k3():
    pi, ref = responses(*tree(0)), responses(*tree(1))
    batch = plain_batch(torch.ones(9, 2, dtype=torch.bool), pi)
    batch.fill(old_logprobs=pi, ref_logprobs=ref)
    torch.testing.assert_close(KL_LOSSES["k3+"](PolicyOutput(pi, pi), batch), k3(pi, ref))


def test_the_prefix_of_rao_blackwell_skips_what_is_masked_and_excludes_its_own_token():
    """Ratios 2, (masked), 3, 5 before KLs 1, 1, 1, 1: weights 1, -, 2, 6."""
    mask = torch.tensor([[True, False, True, True]])
    log_ratio = torch.tensor([[2.0, 7.0, 3.0, 5.0]], dtype=F64).log()
    batch = plain_batch(mask, 0 * log_ratio)
    batch.fill(old_logprobs=0 * log_ratio)
    new = PolicyOutput(log_ratio, 0 * log_ratio, kl_pi_ref=torch.ones(1, 4, dtype=F64))
    assert KL_LOSSES["rao_blackwell"](new, batch)[mask].tolist() == pytest.approx([1.0, 2.0, 6.0])
    batch.ref_logprobs = log_ratio - 1.0  # u = 1: k3 = exp(-1)
    assert KL_LOSSES["wk3_prefix"](new, batch)[mask].tolist() == pytest.approx(
        [x / math.e for x in (2.0, 6.0, 30.0)]
    )


def test_prefix_weights_are_clamped_as_a_ratio_is():
    """A response of many tokens that all became likelier: exp(20) at most, and finite gradients."""
    log_ratio = torch.full((1, 50), 3.0, requires_grad=True)
    batch = plain_batch(torch.ones(1, 50, dtype=torch.bool), torch.zeros(1, 50))
    batch.fill(old_logprobs=torch.zeros(1, 50), ref_logprobs=torch.full((1, 50), 2.0))
    new = PolicyOutput(log_ratio, torch.zeros(1, 50), kl_pi_ref=torch.ones(1, 50))
    for name in ("rao_blackwell", "wk3_prefix", "wk3_token", "wk2_token"):
        value = KL_LOSSES[name](new, batch)
        assert value.isfinite().all()
        assert value.max() <= math.exp(20) * 1.001
        assert grad(value.sum(), log_ratio).isfinite().all()
