"""Policy losses and the value loss. Weights of tokens: test_weights.py."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.losses import (
    LOSSES,
    cispo,
    clip,
    clip_cov,
    dppo_kl,
    dppo_tv,
    gmpo,
    gspo,
    importance_ratio,
    kl_cov,
    reinforce,
    sapo,
    spo,
    surrogate,
    top_entropy,
    topr,
    value_loss,
    vespo,
)
from rlkl.types import Batch, PolicyOutput

B, T = 3, 5
F64 = torch.float64


def near(seed: int = 0, sigma: float = 0.3) -> tuple[PolicyOutput, Batch]:
    """A float64 policy output, and a filled batch whose pi_old is `sigma` nats away;
    responses of 5, 1, 3.
    """
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor([[5], [1], [3]])

    def normal() -> torch.Tensor:
        return torch.randn(B, T, generator=g, dtype=F64)

    ids, old = torch.zeros(B, T, dtype=torch.long), -normal().abs()
    batch = Batch(
        ids,
        mask,
        ids,
        mask,
        old,
        torch.zeros(B, dtype=torch.bool),
        old_logprobs=old,
        ref_logprobs=normal(),
    )
    batch.values, batch.returns, batch.advantages = normal(), normal(), normal()
    leaves = (old + sigma * normal(), normal().abs(), batch.values + sigma * normal())
    new = PolicyOutput(*(x.masked_fill(~mask, 0.0).requires_grad_() for x in leaves))
    batch.selected = mask & (torch.rand(B, T, generator=g) > 0.4)
    assert 0 < batch.selected.sum() < mask.sum()
    batch.zero_padding()
    return new, batch


def slope(ratio: float, advantage: float, **options: float) -> tuple[float, float]:
    """(objective, d objective / d ratio) of one token at this ratio; the loss is minus the
    objective.
    """
    new, batch = row([math.log(ratio)], [0.0], [advantage])
    loss, diagnostics = clip(new, batch, **options)
    assert diagnostics["ratio"].item() == pytest.approx(ratio, rel=1e-14)
    (of_logprob,) = torch.autograd.grad(-loss.sum(), new.logprobs)
    return -loss.item(), of_logprob.item() / ratio


# The clip
@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "derivative"),
    [
        (1.5, 1.0, 1.2, 0.0),
        (0.5, 1.0, 0.5, 1.0),
        (1.5, -1.0, -1.5, -1.0),
        (0.5, -1.0, -0.8, 0.0),
        (4.0, -1.0, -4.0, -1.0),
        (1.25, 1.0, 1.2, 0.0),
        (1.1, 2.0, 2.2, 2.0),
        (0.9, -2.0, -1.8, -2.0),
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_clip_truth_table(ratio, advantage, objective, derivative):
    """Objective and derivative in the ratio at ε = 0.2: dead only past the clip in the direction A
    asks for.
    """
    value, g = slope(ratio, advantage)
    assert value == pytest.approx(objective, abs=1e-12)
    assert g == pytest.approx(derivative, abs=1e-12)


def test_a_dead_gradient_is_exactly_zero():
    assert slope(1.2000001, 1.0)[1] == 0
    assert slope(0.7999999, -1.0)[1] == 0


def test_epsilon_high_widens_the_upper_side_only():
    """ε_high = .28: w = 1.25 with A > 0 is alive, w = 1.3 is not; the lower side stays at 0.8."""
    assert slope(1.25, 1.0, epsilon_high=0.28) == pytest.approx((1.25, 1.0))
    assert slope(1.3, 1.0, epsilon_high=0.28) == pytest.approx((1.28, 0.0))
    assert slope(0.75, -1.0, epsilon_high=0.28) == pytest.approx((-0.8, 0.0))
    assert slope(0.75, -1.0, epsilon=0.28, epsilon_high=0.2) == pytest.approx((-0.75, -1.0))


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "derivative"),
    [
        (4.0, -1.0, -3.0, 0.0),  # PPO: -4, -1
        (3.1, -2.0, -6.0, 0.0),
        (2.9, -2.0, -5.8, -2.0),
        (1.5, -1.0, -1.5, -1.0),
        (0.5, -1.0, -0.8, 0.0),
        (4.0, 1.0, 1.2, 0.0),
        (1.1, 1.0, 1.1, 1.0),
        (0.5, 1.0, 0.5, 1.0),
        (4.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_dual_clip_truth_table(ratio, advantage, objective, derivative):
    """ε = 0.2, delta = 3: max(min(wA, clip A), 3A) where A < 0, so a token costs at most 3|A|."""
    assert slope(ratio, advantage, delta=3.0) == pytest.approx((objective, derivative), abs=1e-12)
    dead = advantage != 0
    (found,) = pull(clip, [ratio], [advantage], start=0.02, dead_at_zero=dead, delta=3.0)
    assert found == pytest.approx(ratio * derivative, abs=1e-12)


def test_delta_changes_bad_tokens_beyond_it_and_no_others():
    count = 0
    for seed in range(12):
        new, batch = near(seed, sigma=1.5)
        options = {"epsilon": 0.1, "epsilon_high": 0.3}
        plain, diagnostics = clip(new, batch, **options)
        far, _ = clip(new, batch, delta=1e9, **options)
        assert torch.equal(far, plain)
        bounded, with_delta = clip(new, batch, delta=1.5, **options)
        beyond = (diagnostics["ratio"] > 1.5) & (batch.advantages < 0)
        count += int(beyond.sum())
        assert torch.equal(bounded[~beyond], plain[~beyond])
        assert bounded[beyond].lt(plain[beyond]).all()
        expected = -1.5 * batch.advantages[beyond]
        torch.testing.assert_close(bounded[beyond], expected, atol=1e-14, rtol=0)
        fraction = torch.where(beyond, 1.0, diagnostics["clip_fraction"])
        assert torch.equal(with_delta["clip_fraction"], fraction)
        assert torch.equal(with_delta["ratio"], diagnostics["ratio"])  # not as it was bounded
    assert count > 5


def test_epsilon_high_belongs_to_the_upper_side_and_0_is_a_value():
    ratios = torch.tensor([[1.25, 0.75]], dtype=F64)
    ones = torch.ones(1, 2, dtype=torch.bool)
    batch = Batch(
        ones.long(), ones, ones.long(), ones, 0 * ratios, torch.zeros(1, dtype=torch.bool)
    )
    batch.old_logprobs, batch.advantages = 0 * ratios, torch.tensor([[1.0, -1.0]], dtype=F64)
    new = PolicyOutput(ratios.log(), 0 * ratios)
    for options, expected in (
        ({}, [-1.2, 0.8]),
        ({"epsilon_high": 0.28}, [-1.25, 0.8]),
        ({"epsilon": 0.3, "epsilon_high": 0.2}, [-1.2, 0.75]),
        ({"epsilon": 0.1, "epsilon_high": 0.0}, [-1.0, 0.9]),  # 0 is a clip, not "none given"
    ):
        per_token, stats = clip(new, batch, **options)
        assert per_token[0].tolist() == pytest.approx(expected, abs=1e-12)
        dead = [
            float(e != -w * a) for e, w, a in zip(expected, (1.25, 0.75), (1.0, -1.0), strict=True)
        ]
        assert stats["clip_fraction"][0].tolist() == dead


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_at_ratio_one_the_policy_gradient_is_minus_the_advantage(loss):
    """Every trust region starts as REINFORCE."""
    new, batch = near()
    new = new._replace(logprobs=batch.old_logprobs.clone().requires_grad_())
    per_token, _ = loss(new, batch)
    (g,) = torch.autograd.grad(per_token.sum(), new.logprobs)
    expected = -batch.advantages
    if loss in (top_entropy, clip_cov):  # they leave tokens out
        expected = expected.masked_fill(batch.selected == (loss is clip_cov), 0.0)
    if (
        loss is gmpo
    ):  # each token moves the whole response's ratio, and so earns the mean A of the response
        expected = expected.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True) * batch.mask
    torch.testing.assert_close(g, expected, atol=1e-15, rtol=0)


# The other trust regions
def row(
    logprobs: list[float], old: list[float], advantages: list[float]
) -> tuple[PolicyOutput, Batch]:
    """One response of these tokens."""
    x, o = (torch.tensor([v], dtype=F64) for v in (logprobs, old))
    ones = torch.ones_like(x, dtype=torch.bool)
    batch = Batch(
        ones.long(), ones, ones.long(), ones, o, torch.zeros(1, dtype=torch.bool), old_logprobs=o
    )
    batch.advantages, batch.selected = torch.tensor([advantages], dtype=F64), ones
    return PolicyOutput(x.requires_grad_(), torch.zeros_like(o)), batch


def pull(
    loss,
    ratios: list[float],
    advantages: list[float],
    start: float = 0.2,
    dead_at_zero: bool = True,
    **options,
) -> list[float]:
    """d objective / d log pi of each token of one response, that had probability `start` and is now
    at these ratios.
    """
    old = [math.log(start)] * len(ratios)
    new, batch = row([o + math.log(w) for o, w in zip(old, ratios, strict=True)], old, advantages)
    per_token, stats = loss(new, batch, **options)
    (g,) = torch.autograd.grad(-per_token.sum(), new.logprobs)
    if "clip_fraction" in stats and dead_at_zero:
        assert stats["clip_fraction"][0].tolist() == g[0].eq(0).double().tolist()
    return g[0].tolist()


@pytest.mark.parametrize(
    ("loss", "options", "ratio", "advantage", "expected"),
    [
        (clip, {"delta": 3.0}, 4.0, -1.0, 0.0),
        (clip, {"delta": 5.0}, 4.0, -1.0, -4.0),
        (clip, {"epsilon_high": 0.6}, 1.5, 1.0, 1.5),
        (vespo, {}, 1.0, 3.0, 3.0),  # φ(1) = 1
        (vespo, {}, 2.0, 1.0, 4 * math.exp(-3)),  # W² exp(3 (1 - W))
        (vespo, {}, 2.0, -1.0, -8 * math.exp(-2)),  # W³ exp(2 (1 - W))
        (vespo, {}, 0.5, 1.0, 0.25 * math.exp(1.5)),
        (vespo, {"k": 1.0, "lam": 0.5}, 2.0, 1.0, 2 * math.exp(-0.5)),
        (vespo, {"k_negative": 1.0, "lam_negative": 0.5}, 2.0, -1.0, -2 * math.exp(-0.5)),
        (kl_cov, {}, 4.0, 1.0, 4.0 - 1.0),  # never clipped; pulled back by coef · sign(log w)
        (kl_cov, {"coef": 0.5}, 0.25, 1.0, 0.25 + 0.5),
        (kl_cov, {"coef": 0.5}, 4.0, -1.0, -4.5),
        (surrogate, {}, 5.0, 2.0, 10.0),
        (reinforce, {}, 5.0, 2.0, 2.0),  # no ratio at all
        (reinforce, {}, 0.1, -2.0, -2.0),
        (cispo, {}, 4.0, 1.0, 4.0),  # never dead: past the cap the weight stays at the cap
        (cispo, {}, 4.9, -1.0, -4.9),
        (cispo, {"cap": 2.0}, 4.0, 1.0, 2.0),
        (cispo, {"cap": 2.0}, 4.0, -1.0, -2.0),
        (cispo, {}, 0.01, -1.0, -0.01),  # and small ratios stay small
        (sapo, {}, 1.0, 3.0, 3.0),
        (
            sapo,
            {},
            3.0,
            1.0,
            3 * 4 * 0.8807970779778823 * (1 - 0.8807970779778823),
        ),  # w · 4σ(1-σ), σ = σ(2)
        (
            sapo,
            {"tau_negative": 2.0},
            2.0,
            -1.0,
            -2 * 4 * 0.8807970779778823 * (1 - 0.8807970779778823),
        ),
        (dppo_tv, {}, 1.7, 1.0, 1.7),  # .2 → .34, moved by .14
        (dppo_tv, {}, 1.8, 1.0, 0.0),  # .36, by .16: dead
        (dppo_tv, {}, 1.8, -1.0, -1.8),  # A asks for less of it: pulled back
        (dppo_tv, {}, 0.3, -1.0, -0.3),
        (dppo_tv, {}, 0.2, -1.0, 0.0),
        (dppo_tv, {}, 0.2, 1.0, 0.2),
        (dppo_tv, {"epsilon_high": 0.1}, 1.6, 1.0, 0.0),
        (dppo_tv, {"epsilon_high": 0.1}, 0.3, -1.0, -0.3),
        (dppo_tv, {"epsilon": 0.3, "cap": 1.5}, 1.8, 1.0, 1.5),
        (dppo_kl, {}, 1.6, 1.0, 1.6),  # KL(.2, .32) = .037
        (dppo_kl, {}, 1.8, 1.0, 0.0),  # KL(.2, .36) = .061
        (dppo_kl, {}, 1.8, -1.0, -1.8),
        (dppo_kl, {}, 0.5, -1.0, -0.5),  # KL(.2, .1) = .044
        (dppo_kl, {}, 0.4, -1.0, 0.0),  # KL(.2, .08) = .071
        (dppo_kl, {}, 0.4, 1.0, 0.4),
        (dppo_kl, {"epsilon_high": 0.03}, 1.6, 1.0, 0.0),
        (spo, {}, 1.1, 1.0, 1.1 * 0.5),  # w (A - |A| (w - 1) / ε)
        (spo, {}, 1.2, 1.0, 0.0),  # the top
        (spo, {}, 1.4, 1.0, -1.4),  # past it: pulled back, where PPO's gradient is dead
        (spo, {}, 0.8, -1.0, 0.0),
        (spo, {}, 0.6, -2.0, 1.2),
        (spo, {}, 0.9, 1.0, 0.9 * 1.5),
        (spo, {"epsilon": 0.4}, 1.4, 1.0, 0.0),
    ],
)
def test_what_each_trust_region_does_to_one_token(loss, options, ratio, advantage, expected):
    assert pull(loss, [ratio], [advantage], **options)[0] == pytest.approx(expected, abs=1e-12)


def test_dppo_asks_how_much_probability_moved_and_not_by_what_factor():
    """A rare token may grow threefold; from .9, a ratio of .8 that PPO still pushes is already .18
    away.
    """
    assert pull(dppo_tv, [3.0], [1.0], start=0.01) == pytest.approx([3.0])
    assert pull(dppo_tv, [0.83], [-1.0], start=0.9) == [0.0]
    assert pull(clip, [3.0], [1.0], start=0.01) == [0.0]
    assert pull(clip, [0.83], [-1.0], start=0.9) == pytest.approx([-0.83])


@pytest.mark.parametrize("loss", [dppo_tv, dppo_kl])
def test_dppo_measures_from_the_policy_that_sampled_and_weighs_from_pi_old(loss):
    new, batch = row([math.log(0.5)], [math.log(0.4)], [1.0])
    batch.sampler_logprobs = torch.full((1, 1), math.log(0.1), dtype=F64)
    (g,) = torch.autograd.grad(loss(new, batch)[0].sum(), new.logprobs)
    assert g.item() == 0  # .4 away from mu, .1 from pi_old
    (g,) = torch.autograd.grad(loss(new, batch, epsilon=5.0)[0].sum(), new.logprobs)
    assert g.item() == pytest.approx(-1.25)


def test_gspo_clips_responses_and_not_tokens():
    """Ratios 2 and ½: the response's is 1, and both tokens have it. Past the clip, dead in A's
    direction only.
    """
    assert pull(gspo, [2.0, 0.5], [1.0, -3.0]) == pytest.approx([1.0, -3.0])
    s = math.exp(5e-4)
    assert pull(gspo, [s, s], [1.0, -1.0]) == pytest.approx([0.0, -s], abs=1e-12)
    assert pull(gspo, [1 / s, 1 / s], [1.0, -1.0]) == pytest.approx([1 / s, 0.0], abs=1e-12)
    inside = math.exp(3.5e-4)  # between .0003 and .0004: the upper side is the wider
    assert pull(gspo, [inside], [1.0]) == pytest.approx([inside])
    assert pull(gspo, [1 / inside], [-1.0]) == [0.0]
    assert pull(gspo, [inside], [1.0], epsilon_high=3e-4) == [0.0]


def test_gmpo_clips_in_log_space_before_the_geometric_mean():
    """Ratios e^.6 and e^.2, A > 0: exp((.4 + .2)/2), only the second token alive; A < 0: exp((.6 +
    .2)/2), both.
    """
    up = [math.exp(0.6), math.exp(0.2)]
    assert pull(gmpo, up, [1.0, 1.0]) == pytest.approx([0.0, math.exp(0.3)])
    assert pull(gmpo, up, [-1.0, -1.0]) == pytest.approx([-math.exp(0.4)] * 2)
    down = [math.exp(-0.6), math.exp(0.2)]
    assert pull(gmpo, down, [-1.0, -1.0]) == pytest.approx([0.0, -math.exp(-0.1)])
    assert pull(gmpo, down, [1.0, 1.0]) == pytest.approx([math.exp(-0.2)] * 2)
    assert pull(gmpo, up, [1.0, 1.0], epsilon_high=0.7) == pytest.approx([math.exp(0.4)] * 2)
    assert pull(gmpo, down, [-1.0, -1.0], epsilon=0.7) == pytest.approx([-math.exp(-0.2)] * 2)


def test_topr_weighs_bad_responses_by_the_ratio_of_the_whole_response():
    """c = min(Π w, 1) where A < 0, and 1 where A >= 0 however far pi has gone."""
    assert pull(topr, [0.5, 0.5], [-1.0, 1.0]) == pytest.approx([-0.25, 1.0])
    assert pull(topr, [0.5, 4.0], [-1.0, 1.0]) == pytest.approx([-1.0, 1.0])
    assert pull(topr, [0.01, 0.01], [2.0, 2.0]) == pytest.approx([2.0, 2.0])


def test_vespo_weighs_a_whole_response_softly_and_passes_no_gradient_through_the_weight():
    """Tokens of ratio 2 and 3 have W = 6; 2 and ½ have W = 1 and so count in full. Far away on
    either side: nothing.
    """
    up, down = 36 * math.exp(-15), 216 * math.exp(-10)
    assert pull(vespo, [2.0, 3.0], [1.0, -1.0]) == pytest.approx([up, -down], rel=1e-9)
    assert pull(vespo, [2.0, 0.5], [1.0, -3.0]) == pytest.approx([1.0, -3.0])
    assert pull(vespo, [50.0, 1.0], [1.0, -1.0]) == pytest.approx([0.0, 0.0], abs=1e-30)
    assert pull(vespo, [1e-4, 1.0], [1.0, -1.0]) == pytest.approx([0.0, 0.0], abs=1e-6)
    new, batch = row([-1.0, -2.0], [-1.0 - math.log(2), -2.0], [1.0, 1.0])
    weight = 4 * math.exp(-3)
    assert vespo(new, batch)[0][0].tolist() == pytest.approx([weight, 2 * weight])  # -φ A log pi


# Losses about selected tokens
SELECTIVE = {"top_entropy": top_entropy, "clip_cov": clip_cov, "kl_cov": kl_cov}


@pytest.mark.parametrize("name", SELECTIVE)
def test_a_loss_about_selected_tokens_says_which_selector_to_set(name):
    new, batch = near()
    batch.selected = None
    with pytest.raises(ValueError, match=f"{name} acts on selected tokens: set selector={name}"):
        SELECTIVE[name](new, batch)


def of_logprobs(per_token: torch.Tensor, new: PolicyOutput) -> torch.Tensor:
    return torch.autograd.grad(per_token.sum(), new.logprobs, retain_graph=True)[0]


@pytest.mark.parametrize(("loss", "lives"), [(top_entropy, True), (clip_cov, False)])
def test_only_the_tokens_meant_have_a_gradient(loss, lives):
    """That of clip, exactly, where selected (top_entropy) or where not (clip_cov); else exactly
    zero.
    """
    for seed in range(3):
        new, batch = near(seed, sigma=0.6)
        alive = batch.selected == lives
        selective, diagnostics = loss(new, batch, epsilon=0.1, epsilon_high=0.4)
        policy, plain = clip(new, batch, epsilon=0.1, epsilon_high=0.4)
        assert torch.equal(of_logprobs(selective, new)[alive], of_logprobs(policy, new)[alive])
        assert of_logprobs(selective, new)[~alive].eq(0).all()
        assert of_logprobs(policy, new)[~alive & batch.mask].ne(0).any()
        assert torch.equal(selective, policy * alive)
        assert torch.equal(diagnostics["ratio"], plain["ratio"])


@pytest.mark.parametrize("seed", range(3))
def test_kl_cov_adds_a_pull_to_pi_old_on_selected_tokens_alone(seed):
    """coef · |log w|: its gradient is coef · sign(log w); all others have the unclipped
    surrogate's, exactly.
    """
    new, batch = near(seed, sigma=1.0)
    got, stats = kl_cov(new, batch, coef=0.7)
    plain, _ = surrogate(new, batch)
    log_ratio = (new.logprobs - batch.old_logprobs).detach()
    chosen = batch.selected
    assert torch.equal(got[~chosen], plain[~chosen])
    torch.testing.assert_close(
        (got - plain)[chosen], 0.7 * log_ratio.abs()[chosen], atol=1e-14, rtol=0
    )
    extra = of_logprobs(got, new) - of_logprobs(plain, new)
    torch.testing.assert_close(extra, 0.7 * log_ratio.sign() * chosen, atol=1e-14, rtol=0)
    assert torch.equal(stats["moved"], log_ratio.abs() * chosen)


@pytest.mark.parametrize(
    ("loss", "options", "twin", "all_of_them"),
    [
        (top_entropy, {}, clip, True),
        (clip_cov, {}, clip, False),
        (kl_cov, {}, surrogate, False),
        (kl_cov, {"coef": 0.0}, surrogate, True),
    ],
)
def test_with_nothing_left_out_they_are_clip_and_surrogate(loss, options, twin, all_of_them):
    new, batch = near(sigma=0.6)
    batch.selected = batch.mask & all_of_them
    assert torch.equal(loss(new, batch, **options)[0], twin(new, batch)[0])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_one_broken_token_overflows_no_loss_and_no_gradient(loss):
    """In float32, a token whose log-prob is wrong by this many nats."""
    for case in itertools.product((1e4, -1e4, 90.0, -90.0), (1.0, -1.0), (True, False)):
        nats, advantage, selected = case
        new, batch = row([-1.0, -1.0 + nats], [-1.0, -1.0], [advantage] * 2)
        batch.selected = batch.mask & selected
        batch.sampler_logprobs = batch.old_logprobs = batch.old_logprobs.float()
        batch.advantages = batch.advantages.float()
        leaf = new.logprobs.detach().float().requires_grad_()
        per_token, _ = loss(PolicyOutput(leaf, torch.zeros(1, 2)), batch)
        assert per_token.isfinite().all(), case
        assert torch.autograd.grad(per_token.sum(), leaf)[0].isfinite().all(), case


@settings(deadline=None, max_examples=100)
@given(
    ratios=st.lists(st.floats(0.3, 3.0), min_size=8, max_size=8),
    advantages=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=8, max_size=8),
    low=st.floats(0.05, 0.4),
    high=st.floats(0.05, 0.9),
    cap=st.floats(1.95, 4.0),
)
def test_clipped_tokens_are_those_whose_gradient_the_clip_killed(
    ratios, advantages, low, high, cap
):
    """As autograd sees it: A is not zero, and yet the gradient is."""
    x = torch.tensor(ratios, dtype=F64).log()
    a = torch.tensor(advantages, dtype=F64)
    for delta in (math.inf, cap):
        new, batch = row(x.tolist(), [0.0] * 8, advantages)
        loss, diagnostics = clip(new, batch, epsilon=low, epsilon_high=high, delta=delta)
        (g,) = torch.autograd.grad(loss.sum(), new.logprobs)
        dead = (g[0] == 0) & (a != 0)
        assert diagnostics["clip_fraction"][0].tolist() == dead.double().tolist()


def test_the_log_ratio_is_clamped_at_20_nats():
    """One broken token, even an infinite one, cannot overflow; up to 20 nats the ratio is
    untouched.
    """
    for nats, ratio in (
        (19.0, math.exp(19)),
        (25.0, math.exp(20)),
        (1e6, math.exp(20)),
        (-300.0, math.exp(-20)),
    ):
        assert float(importance_ratio(torch.tensor(nats), torch.tensor(0.0))) == pytest.approx(
            ratio, rel=1e-5
        )


def test_surrogate_is_not_clipped():
    new, batch = near(sigma=3.0)
    per_token, stats = surrogate(new, batch)
    expected = -(new.logprobs - batch.old_logprobs).exp() * batch.advantages
    torch.testing.assert_close(per_token[batch.mask], expected[batch.mask])
    assert "clip_fraction" not in stats


# The value loss
@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "derivative"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9),  # inside the clip: (V - R)²/2
        (
            1.5,
            1.0,
            2.0,
            0.32,
            0.0,
        ),  # moved too far towards R: the clipped one, (1.2 - 2)²/2, and no gradient
        (0.5, 1.0, 2.0, 1.125, -1.5),  # moved away from R: the true one, so it is pulled back
        (2.5, 1.0, 2.0, 0.32, 0.0),  # past R, but nearer to it than the clipped one: still dead
        (3.5, 1.0, 2.0, 1.125, 1.5),  # past R, and further away than the clipped one: pulled back
        (0.5, 1.0, 0.0, 0.32, 0.0),  # the lower side
        (1.0, 1.0, 1.0, 0.0, 0.0),
    ],
)
def test_the_value_loss_by_cases(value, old, target, loss, derivative):
    """ε_v = 0.2. The larger of the two squares: a pessimistic bound, dead where the move has been
    made already.
    """
    v = torch.tensor(value, dtype=F64, requires_grad=True)
    others = torch.tensor([old, target], dtype=F64)
    got = value_loss(v, *others, clip=0.2)
    assert float(got.detach()) == pytest.approx(loss, abs=1e-12)
    assert float(torch.autograd.grad(got, v)[0]) == pytest.approx(derivative, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "target", "loss", "derivative"),
    [(1.5, 2.0, 0.125, -0.5), (5.0, 2.0, 4.5, 3.0), (-1.0, 0.0, 0.5, -1.0)],
)
def test_without_a_clip_the_value_loss_is_half_the_squared_error(value, target, loss, derivative):
    v = torch.tensor(value, dtype=F64, requires_grad=True)
    others = torch.tensor([1.0, target], dtype=F64)
    got = value_loss(v, *others, clip=None)
    assert float(got.detach()) == pytest.approx(loss, abs=1e-12)
    assert float(torch.autograd.grad(got, v)[0]) == pytest.approx(derivative, abs=1e-12)


# Every entry
DETACHED = {
    "gspo",
    "cispo",
    "dppo_tv",
    "dppo_kl",
    "topr",
    "vespo",
}  # their gradient is not of their value


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in DETACHED])
def test_gradcheck(name):
    """Autograd equals finite differences in the log-probs, clipped tokens among them."""
    for seed in range(3):
        new, batch = near(seed, sigma=0.6)

        def of_logprobs(logprobs: torch.Tensor, new=new, batch=batch) -> torch.Tensor:
            return LOSSES[name](new._replace(logprobs=logprobs), batch)[0][batch.mask]

        assert torch.autograd.gradcheck(of_logprobs, (new.logprobs,))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_policy_loss_is_the_policy_term_alone(loss):
    """No entropy bonus and no value loss: those are terms of their own in train.py. No critic
    needed.
    """
    new, batch = near()
    per_token, diagnostics = loss(new, batch)
    inputs = (new.logprobs, new.entropy, new.values)
    gradients = torch.autograd.grad(per_token.sum(), inputs, allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1:] == (None, None)
    assert all(x.shape == batch.mask.shape for x in (per_token, *diagnostics.values()))
    batch.values = batch.returns = None
    assert torch.equal(loss(new._replace(values=None), batch)[0], per_token)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_policy_loss_is_positively_homogeneous_in_the_advantage(loss):
    """So a truncated importance weight may be folded into A. kl_cov's penalty is switched off."""
    options = {"coef": 0.0} if loss is kl_cov else {}
    for scale in (0.5, 4.0):
        new, batch = near(sigma=0.6)
        before = loss(new, batch, **options)[0]
        batch.advantages = scale * batch.advantages
        after = loss(new, batch, **options)[0]
        torch.testing.assert_close(after, scale * before, atol=1e-14, rtol=0)
