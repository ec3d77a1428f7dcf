"""Policy objectives: what the clip does to value and gradient, and weights that no way of cutting can change."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.losses import (
    LOSSES,
    cispo,
    clip_cov,
    clipped_surrogate,
    clipped_tokens,
    clipped_value_loss,
    dppo_kl,
    dppo_tv,
    dual_clip,
    gmpo,
    grpo,
    gspo,
    importance_ratio,
    kl_cov,
    ppo,
    reinforce,
    sapo,
    spo,
    surrogate,
    token_weights,
    top_entropy,
    topr,
    vespo,
)
from rlkl.types import Batch, Evaluation

B, T = 3, 5
F64 = torch.float64


def near(seed: int = 0, sigma: float = 0.3) -> tuple[Evaluation, Batch]:
    """A float64 evaluation with leaves, and a filled batch whose pi_old is `sigma` nats away; replies of 5, 1, 3."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor([[5], [1], [3]])

    def normal() -> torch.Tensor:
        return torch.randn(B, T, generator=g, dtype=F64)

    ids, old = torch.zeros(B, T, dtype=torch.long), -normal().abs()
    batch = Batch(ids, mask, ids, mask, old, torch.zeros(B, dtype=torch.bool), old_logprobs=old, ref_logprobs=normal())
    batch.values, batch.returns, batch.advantages = normal(), normal(), normal()
    leaves = (old + sigma * normal(), normal().abs(), batch.values + sigma * normal())
    new = Evaluation(*(x.masked_fill(~mask, 0.0).requires_grad_() for x in leaves))
    batch.selected = mask & (torch.rand(B, T, generator=g) > 0.4)
    assert 0 < batch.selected.sum() < mask.sum()
    return new, batch


def slope(
        ratio: float, advantage: float, low: float, high: float, cap: float = math.inf) -> tuple[float, float]:
    """(objective, d objective / d ratio) of one token at this ratio; the loss is minus the objective."""
    w = torch.tensor(ratio, dtype=F64, requires_grad=True)
    zero, a = torch.zeros((), dtype=F64), torch.tensor(advantage, dtype=F64)
    loss, shown = clipped_surrogate(w.log(), zero, a, low, high, cap)
    assert float(shown.detach()) == pytest.approx(ratio, rel=1e-14)
    (g,) = torch.autograd.grad(-loss, w)
    return float(-loss.detach()), float(g)


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
    """Objective and derivative in the ratio at ε = 0.2: dead only past the clip in the direction A asks for."""
    value, g = slope(ratio, advantage, 0.2, 0.2)
    assert value == pytest.approx(objective, abs=1e-12)
    assert g == pytest.approx(derivative, abs=1e-12)


def test_a_dead_gradient_is_exactly_zero():
    assert slope(1.2000001, 1.0, 0.2, 0.2)[1] == 0
    assert slope(0.7999999, -1.0, 0.2, 0.2)[1] == 0


def test_clip_high_widens_the_upper_side_only():
    """ε_high = .28: w = 1.25 with A > 0 is alive, w = 1.3 is not; the lower side stays at 0.8."""
    assert slope(1.25, 1.0, 0.2, 0.28) == pytest.approx((1.25, 1.0))
    assert slope(1.3, 1.0, 0.2, 0.28) == pytest.approx((1.28, 0.0))
    assert slope(0.75, -1.0, 0.2, 0.28) == pytest.approx((-0.8, 0.0))
    assert slope(0.75, -1.0, 0.28, 0.2) == pytest.approx((-0.75, -1.0))


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
    """ε = 0.2, c = 3: max(min(wA, clip A), cA) where A < 0, so that one token costs at most c|A|; else PPO's."""
    assert slope(ratio, advantage, 0.2, 0.2, cap=3.0) == pytest.approx((objective, derivative), abs=1e-12)
    start = 0.02
    old = [math.log(start)]
    new, batch = row([old[0] + math.log(ratio)], old, [advantage])
    assert float(dual_clip(new, batch)[0].detach()) == pytest.approx(-objective, abs=1e-12)
    assert pull(dual_clip, [ratio], [advantage], start=start, dead_at_zero=advantage != 0)[0] == pytest.approx(
        ratio * derivative, abs=1e-12)


def test_dual_clip_is_grpo_but_for_bad_tokens_beyond_the_cap():
    found = 0
    for seed in range(12):
        new, batch = near(seed, sigma=1.5)
        options = {"clip": 0.1, "clip_high": 0.3, "entropy_coef": 0.2}
        plain, plain_stats = grpo(new, batch, **options)
        far, far_stats = dual_clip(new, batch, cap=1e9, **options)
        assert torch.equal(far, plain)
        assert torch.equal(far_stats["clip_fraction"], plain_stats["clip_fraction"])
        held, stats = dual_clip(new, batch, cap=1.5, **options)
        beyond = (stats["ratio"] > 1.5) & (batch.advantages < 0)
        found += int(beyond.sum())
        assert torch.equal(held[~beyond], plain[~beyond])
        assert held[beyond].lt(plain[beyond]).all()
        expected = -1.5 * batch.advantages - 0.2 * new.entropy
        torch.testing.assert_close(held[beyond], expected[beyond], atol=1e-14, rtol=0)
        assert torch.equal(stats["clip_fraction"], torch.where(beyond, 1.0, plain_stats["clip_fraction"]))
        assert torch.equal(stats["ratio"], plain_stats["ratio"])  # as it is, not as it was capped
    assert found > 5


def test_ppo_clips_as_grpo_and_dual_clip_do():
    """Its clip_high and its cap, with the value loss switched off."""
    new, batch = near(sigma=1.5)
    for options, twin in (
        ({}, grpo),
        ({"clip": 0.1, "clip_high": 0.4}, grpo),
        ({"clip_high": 0.0}, grpo),
        ({"cap": 1.5}, dual_clip),
        ({"clip": 0.1, "clip_high": 0.3, "cap": 2.0}, dual_clip),
    ):
        got, stats = ppo(new, batch, value_coef=0.0, **options)
        expected, expected_stats = twin(new, batch, **options)
        torch.testing.assert_close(got, expected, atol=1e-15, rtol=0)
        assert torch.equal(stats["clip_fraction"], expected_stats["clip_fraction"])


def test_grpo_hands_clip_high_to_the_upper_side():
    ratios = torch.tensor([[1.25, 0.75]], dtype=F64)
    ones = torch.ones(1, 2, dtype=torch.bool)
    batch = Batch(ones.long(), ones, ones.long(), ones, 0 * ratios, torch.zeros(1, dtype=torch.bool))
    batch.old_logprobs, batch.advantages = 0 * ratios, torch.tensor([[1.0, -1.0]], dtype=F64)
    new = Evaluation(ratios.log(), 0 * ratios)
    for options, expected in (
        ({}, [-1.2, 0.8]),
        ({"clip_high": 0.28}, [-1.25, 0.8]),
        ({"clip": 0.3, "clip_high": 0.2}, [-1.2, 0.75]),
        ({"clip": 0.1, "clip_high": 0.0}, [-1.0, 0.9]),  # 0 is a clip, not "none given"
    ):
        per_token, stats = grpo(new, batch, **options)
        assert per_token[0].tolist() == pytest.approx(expected, abs=1e-12)
        dead = [float(e != -w * a) for e, w, a in zip(expected, (1.25, 0.75), (1.0, -1.0), strict=True)]
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
    if loss is gmpo:  # each token moves the whole reply's ratio, and so earns the mean A of the reply
        expected = expected.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True) * batch.mask
    torch.testing.assert_close(g, expected, atol=1e-15, rtol=0)


# The other trust regions
def row(logprobs: list[float], old: list[float], advantages: list[float]) -> tuple[Evaluation, Batch]:
    """One reply of these tokens."""
    x, o = (torch.tensor([v], dtype=F64) for v in (logprobs, old))
    ones = torch.ones_like(x, dtype=torch.bool)
    batch = Batch(ones.long(), ones, ones.long(), ones, o, torch.zeros(1, dtype=torch.bool), old_logprobs=o)
    batch.advantages, batch.selected = torch.tensor([advantages], dtype=F64), ones
    return Evaluation(x.requires_grad_(), torch.zeros_like(o)), batch


def pull(loss, ratios: list[float], advantages: list[float], start: float = 0.2, dead_at_zero: bool = True,
         **options) -> list[float]:
    """d objective / d log pi of each token of one reply, that had probability `start` and is now at these ratios."""
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
        (dual_clip, {}, 4.0, -1.0, 0.0),
        (dual_clip, {"cap": 5.0}, 4.0, -1.0, -4.0),
        (dual_clip, {"clip_high": 0.6}, 1.5, 1.0, 1.5),
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
        (sapo, {}, 3.0, 1.0, 3 * 4 * 0.8807970779778823 * (1 - 0.8807970779778823)),  # w · 4σ(1-σ), σ = σ(2)
        (sapo, {"tau_negative": 2.0}, 2.0, -1.0, -2 * 4 * 0.8807970779778823 * (1 - 0.8807970779778823)),
        (dppo_tv, {}, 1.7, 1.0, 1.7),  # .2 → .34, moved by .14
        (dppo_tv, {}, 1.8, 1.0, 0.0),  # .36, by .16: dead
        (dppo_tv, {}, 1.8, -1.0, -1.8),  # A asks for less of it: pulled back
        (dppo_tv, {}, 0.3, -1.0, -0.3),
        (dppo_tv, {}, 0.2, -1.0, 0.0),
        (dppo_tv, {}, 0.2, 1.0, 0.2),
        (dppo_tv, {"clip_high": 0.1}, 1.6, 1.0, 0.0),
        (dppo_tv, {"clip_high": 0.1}, 0.3, -1.0, -0.3),
        (dppo_tv, {"clip": 0.3, "cap": 1.5}, 1.8, 1.0, 1.5),
        (dppo_kl, {}, 1.6, 1.0, 1.6),  # KL(.2, .32) = .037
        (dppo_kl, {}, 1.8, 1.0, 0.0),  # KL(.2, .36) = .061
        (dppo_kl, {}, 1.8, -1.0, -1.8),
        (dppo_kl, {}, 0.5, -1.0, -0.5),  # KL(.2, .1) = .044
        (dppo_kl, {}, 0.4, -1.0, 0.0),  # KL(.2, .08) = .071
        (dppo_kl, {}, 0.4, 1.0, 0.4),
        (dppo_kl, {"clip_high": 0.03}, 1.6, 1.0, 0.0),
        (spo, {}, 1.1, 1.0, 1.1 * 0.5),  # w (A - |A| (w - 1) / ε)
        (spo, {}, 1.2, 1.0, 0.0),  # the top
        (spo, {}, 1.4, 1.0, -1.4),  # past it: pulled back, where PPO's gradient is dead
        (spo, {}, 0.8, -1.0, 0.0),
        (spo, {}, 0.6, -2.0, 1.2),
        (spo, {}, 0.9, 1.0, 0.9 * 1.5),
        (spo, {"clip": 0.4}, 1.4, 1.0, 0.0),
    ],
)
def test_what_each_trust_region_does_to_one_token(loss, options, ratio, advantage, expected):
    assert pull(loss, [ratio], [advantage], **options)[0] == pytest.approx(expected, abs=1e-12)


def test_dppo_asks_how_much_probability_moved_and_not_by_what_factor():
    """A rare token may grow threefold; from .9, a ratio of .8 that PPO still pushes is already .18 away."""
    assert pull(dppo_tv, [3.0], [1.0], start=0.01) == pytest.approx([3.0])
    assert pull(dppo_tv, [0.83], [-1.0], start=0.9) == [0.0]
    assert pull(grpo, [3.0], [1.0], start=0.01) == [0.0]
    assert pull(grpo, [0.83], [-1.0], start=0.9) == pytest.approx([-0.83])


@pytest.mark.parametrize("loss", [dppo_tv, dppo_kl])
def test_dppo_measures_from_the_policy_that_sampled_and_weighs_from_pi_old(loss):
    new, batch = row([math.log(0.5)], [math.log(0.4)], [1.0])
    batch.sampler_logprobs = torch.full((1, 1), math.log(0.1), dtype=F64)
    (g,) = torch.autograd.grad(loss(new, batch)[0].sum(), new.logprobs)
    assert g.item() == 0  # .4 away from mu, .1 from pi_old
    (g,) = torch.autograd.grad(loss(new, batch, clip=5.0)[0].sum(), new.logprobs)
    assert g.item() == pytest.approx(-1.25)


def test_gspo_clips_replies_and_not_tokens():
    """Ratios 2 and ½: the reply's is 1, and both tokens have it. Past the clip, dead in A's direction only."""
    assert pull(gspo, [2.0, 0.5], [1.0, -3.0]) == pytest.approx([1.0, -3.0])
    s = math.exp(5e-4)
    assert pull(gspo, [s, s], [1.0, -1.0]) == pytest.approx([0.0, -s], abs=1e-12)
    assert pull(gspo, [1 / s, 1 / s], [1.0, -1.0]) == pytest.approx([1 / s, 0.0], abs=1e-12)
    inside = math.exp(3.5e-4)  # between .0003 and .0004: the upper side is the wider
    assert pull(gspo, [inside], [1.0]) == pytest.approx([inside])
    assert pull(gspo, [1 / inside], [-1.0]) == [0.0]
    assert pull(gspo, [inside], [1.0], clip_high=3e-4) == [0.0]


def test_gmpo_clips_in_log_space_before_the_geometric_mean():
    """Ratios e^.6 and e^.2, A > 0: exp((.4 + .2)/2), only the second token alive; A < 0: exp((.6 + .2)/2), both."""
    up = [math.exp(0.6), math.exp(0.2)]
    assert pull(gmpo, up, [1.0, 1.0]) == pytest.approx([0.0, math.exp(0.3)])
    assert pull(gmpo, up, [-1.0, -1.0]) == pytest.approx([-math.exp(0.4)] * 2)
    down = [math.exp(-0.6), math.exp(0.2)]
    assert pull(gmpo, down, [-1.0, -1.0]) == pytest.approx([0.0, -math.exp(-0.1)])
    assert pull(gmpo, down, [1.0, 1.0]) == pytest.approx([math.exp(-0.2)] * 2)
    assert pull(gmpo, up, [1.0, 1.0], clip_high=0.7) == pytest.approx([math.exp(0.4)] * 2)
    assert pull(gmpo, down, [-1.0, -1.0], clip=0.7) == pytest.approx([-math.exp(-0.2)] * 2)


def test_topr_weighs_bad_replies_by_the_whole_replys_ratio():
    """c = min(Π w, 1) where A < 0, and 1 where A >= 0 however far pi has gone."""
    assert pull(topr, [0.5, 0.5], [-1.0, 1.0]) == pytest.approx([-0.25, 1.0])
    assert pull(topr, [0.5, 4.0], [-1.0, 1.0]) == pytest.approx([-1.0, 1.0])
    assert pull(topr, [0.01, 0.01], [2.0, 2.0]) == pytest.approx([2.0, 2.0])


def test_vespo_weighs_a_whole_reply_softly_and_passes_no_gradient_through_the_weight():
    """Tokens of ratio 2 and 3 have W = 6; 2 and ½ have W = 1 and so count in full. Far away on either side: nothing."""
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


def of_logprobs(per_token: torch.Tensor, new: Evaluation) -> torch.Tensor:
    return torch.autograd.grad(per_token.sum(), new.logprobs, retain_graph=True)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("loss", "lives"), [(top_entropy, True), (clip_cov, False)])
def test_only_the_tokens_meant_have_a_policy_gradient_and_all_have_the_entropys(loss, lives, seed):
    """grpo's, exactly, where selected (top_entropy) or where not (clip_cov); exactly zero elsewhere."""
    new, batch = near(seed, sigma=0.6)
    alive = batch.selected == lives
    got, stats = loss(new, batch, clip=0.1, clip_high=0.4, entropy_coef=0.3)
    policy, plain = grpo(new, batch, clip=0.1, clip_high=0.4)
    assert torch.equal(of_logprobs(got, new)[alive], of_logprobs(policy, new)[alive])
    assert of_logprobs(got, new)[~alive].eq(0).all()
    assert of_logprobs(policy, new)[~alive & batch.mask].ne(0).any()
    torch.testing.assert_close(got, policy * alive - 0.3 * new.entropy, atol=1e-15, rtol=0)
    assert torch.equal(stats["policy_loss"], policy * alive)
    assert torch.equal(stats["ratio"], plain["ratio"])


@pytest.mark.parametrize("seed", range(3))
def test_kl_cov_adds_a_pull_to_pi_old_on_selected_tokens_alone(seed):
    """coef · |log w|: its gradient is coef · sign(log w); all others have the unclipped surrogate's, exactly."""
    new, batch = near(seed, sigma=1.0)
    got, stats = kl_cov(new, batch, coef=0.7, entropy_coef=0.3)
    plain, _ = surrogate(new, batch, entropy_coef=0.3)
    log_ratio = (new.logprobs - batch.old_logprobs).detach()
    chosen = batch.selected
    assert torch.equal(got[~chosen], plain[~chosen])
    torch.testing.assert_close((got - plain)[chosen], 0.7 * log_ratio.abs()[chosen], atol=1e-14, rtol=0)
    extra = of_logprobs(got, new) - of_logprobs(plain, new)
    torch.testing.assert_close(extra, 0.7 * log_ratio.sign() * chosen, atol=1e-14, rtol=0)
    assert torch.equal(stats["moved"], log_ratio.abs() * chosen)


@pytest.mark.parametrize(("loss", "options", "twin", "all_of_them"), [
    (top_entropy, {}, grpo, True), (clip_cov, {}, grpo, False), (kl_cov, {}, surrogate, False),
    (kl_cov, {"coef": 0.0}, surrogate, True)])
def test_with_nothing_left_out_or_held_they_are_grpo_and_surrogate(loss, options, twin, all_of_them):
    new, batch = near(sigma=0.6)
    batch.selected = batch.mask & all_of_them
    assert torch.equal(loss(new, batch, **options)[0], twin(new, batch)[0])


@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("nats", [1e4, -1e4, 90.0, -90.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_one_broken_token_overflows_no_loss_and_no_gradient(loss, nats, advantage, selected):
    """In float32, a token whose log-prob is wrong by this much."""
    new, batch = row([-1.0, -1.0 + nats], [-1.0, -1.0], [advantage] * 2)
    batch.selected = batch.mask & selected
    batch.sampler_logprobs = batch.old_logprobs = batch.old_logprobs.float()
    batch.advantages, batch.values, batch.returns = batch.advantages.float(), *torch.zeros(2, 1, 2)
    leaf = new.logprobs.detach().float().requires_grad_()
    per_token, _ = loss(Evaluation(leaf, torch.zeros(1, 2), torch.zeros(1, 2)), batch)
    assert per_token.isfinite().all()
    assert torch.autograd.grad(per_token.sum(), leaf)[0].isfinite().all()


@settings(deadline=None, max_examples=100)
@given(
    ratios=st.lists(st.floats(0.3, 3.0), min_size=8, max_size=8),
    advantages=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=8, max_size=8),
    low=st.floats(0.05, 0.4),
    high=st.floats(0.05, 0.9),
    cap=st.floats(1.95, 4.0),
)
def test_clipped_tokens_are_those_whose_gradient_the_clip_killed(ratios, advantages, low, high, cap):
    """As autograd sees it: A is not zero, and yet the gradient is."""
    x = torch.tensor(ratios, dtype=F64).log().requires_grad_()
    a = torch.tensor(advantages, dtype=F64)
    for limits in ((low, high), (low, high, cap)):
        loss, ratio = clipped_surrogate(x, torch.zeros_like(x), a, *limits)
        (g,) = torch.autograd.grad(loss.sum(), x)
        assert clipped_tokens(ratio.detach(), a, *limits).tolist() == ((g == 0) & (a != 0)).double().tolist()


def test_the_log_ratio_is_clamped_at_20_nats():
    """One broken token, even an infinite one, cannot overflow; up to 20 nats the ratio is untouched."""
    for nats, ratio in ((19.0, math.exp(19)), (25.0, math.exp(20)), (1e6, math.exp(20)), (-300.0, math.exp(-20))):
        assert float(importance_ratio(torch.tensor(nats), torch.tensor(0.0))) == pytest.approx(ratio, rel=1e-5)
    broken = torch.tensor([1e4, -1e4, 90.0], requires_grad=True)
    for advantage in (1.0, -1.0):
        loss, _ = clipped_surrogate(broken, torch.zeros(3), torch.full((3,), advantage), 0.2, 0.2)
        (g,) = torch.autograd.grad(loss.sum(), broken)
        assert loss.isfinite().all()
        assert g.isfinite().all()


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
        (1.5, 1.0, 2.0, 0.32, 0.0),  # moved too far towards R: the clipped one, (1.2 - 2)²/2, and no gradient
        (0.5, 1.0, 2.0, 1.125, -1.5),  # moved away from R: the true one, so it is pulled back
        (2.5, 1.0, 2.0, 0.32, 0.0),  # past R, but nearer to it than the clipped one: still dead
        (3.5, 1.0, 2.0, 1.125, 1.5),  # past R, and further away than the clipped one: pulled back
        (0.5, 1.0, 0.0, 0.32, 0.0),  # the lower side
        (1.0, 1.0, 1.0, 0.0, 0.0),
    ],
)
def test_the_clipped_value_loss_by_cases(value, old, target, loss, derivative):
    """ε_v = 0.2. The larger of the two squares: a pessimistic bound, dead where the move has been made already."""
    v = torch.tensor(value, dtype=F64, requires_grad=True)
    got = clipped_value_loss(v, torch.tensor(old, dtype=F64), torch.tensor(target, dtype=F64), 0.2)
    assert float(got.detach()) == pytest.approx(loss, abs=1e-12)
    assert float(torch.autograd.grad(got, v)[0]) == pytest.approx(derivative, abs=1e-12)


# Every entry
def call(loss, new: Evaluation, batch: Batch) -> torch.Tensor:
    return loss(new, batch)[0]


DETACHED = {"gspo", "cispo", "dppo_tv", "dppo_kl", "topr", "vespo"}  # their gradient is not of their value


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [n for n in LOSSES if n not in DETACHED])
def test_gradcheck(name, seed):
    """Autograd equals finite differences in log-probs, entropy and values, clipped tokens among them."""
    new, batch = near(seed, sigma=0.6)
    options = {"entropy_coef": 0.3}

    def f(logprobs: torch.Tensor, entropy: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](Evaluation(logprobs, entropy, values), batch, **options)[0][batch.mask]

    assert torch.autograd.gradcheck(f, (new.logprobs, new.entropy, new.values))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_an_entropy_coefficient_pushes_entropy_up_by_exactly_that(loss):
    """∂loss/∂H = -entropy_coef on each token; 0 by default."""
    for options, expected in (({"entropy_coef": 0.25}, -0.25), ({}, 0.0)):
        new, batch = near()
        per_token, _ = loss(new, batch, **options)
        (g,) = torch.autograd.grad(per_token[batch.mask].sum(), new.entropy)
        assert g[batch.mask].eq(expected).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_policy_term_is_positively_homogeneous_in_the_advantage(loss, scale):
    """So that a truncated importance weight may be folded into A."""
    new, batch = near(sigma=0.6)
    options = {n: 0.0 for n in ("value_coef", "coef") if n in inspect.signature(loss).parameters}
    before = call(loss, new, batch) if not options else loss(new, batch, **options)[0]
    batch.advantages = scale * batch.advantages
    torch.testing.assert_close(loss(new, batch, **options)[0], scale * before, atol=1e-14, rtol=0)


def test_ppo_is_policy_plus_value_minus_entropy():
    new, batch = near(sigma=0.6)
    per_token, stats = ppo(new, batch, clip=0.1, value_coef=0.7, value_clip=0.3, entropy_coef=0.2)
    policy, ratio = clipped_surrogate(new.logprobs, batch.old_logprobs, batch.advantages, 0.1, 0.1)
    value = clipped_value_loss(new.values, batch.values, batch.returns, 0.3)
    torch.testing.assert_close(per_token, policy + 0.7 * value - 0.2 * new.entropy)
    for name, x in (("policy_loss", policy), ("value_loss", value), ("ratio", ratio)):
        assert torch.equal(stats[name], x), name


@pytest.mark.parametrize("missing", ["new.values", "batch.values", "batch.returns"])
def test_ppo_without_a_critic_says_what_to_set(missing):
    new, batch = near()
    where, name = missing.split(".")
    if where == "new":
        new = new._replace(**{name: None})
    else:
        setattr(batch, name, None)
    with pytest.raises(ValueError, match=r"model\.critic"):
        ppo(new, batch)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "ppo"])
def test_other_losses_need_no_critic_and_train_none(name):
    new, batch = near()
    batch.values = batch.returns = None
    per_token, _ = LOSSES[name](new._replace(values=None), batch)
    assert per_token.shape == batch.mask.shape


# Weights
EXAMPLE = torch.tensor([[1.0, 99.0, 99.0], [2.0, 4.0, 6.0]], dtype=F64)  # replies of one and three tokens
EXAMPLE_MASK = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool)
HOW = ("token", "sequence", "constant")


def reduced(per_token: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> float:
    return float((weights * per_token)[mask].sum())


@pytest.mark.parametrize(("how", "loss"), [("sequence", 2.5), ("token", 3.25), ("constant", 1.625)])
def test_the_three_ways_to_weigh_tokens(how, loss):
    """Losses [1] and [2 4 6]: mean of row means, mean of tokens, sum over 2 rows × L = 4."""
    weights = token_weights(EXAMPLE_MASK, how, max_tokens=4)
    assert reduced(EXAMPLE, weights, EXAMPLE_MASK) == pytest.approx(loss, abs=1e-14)


masks = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=7)


@pytest.mark.parametrize("how", HOW)
@settings(deadline=None, max_examples=50)
@given(rows=masks, cut=st.integers(0, 6), seed=st.integers(0, 99))
def test_no_cut_into_micro_batches_changes_the_loss(how, rows, cut, seed):
    """Weights of the whole step, used piece by piece — or made piece by piece with the step's totals — are the same."""
    mask = torch.tensor(rows, dtype=torch.bool)
    losses = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    whole = token_weights(mask, how, 5)
    totals = (int(mask.any(1).sum()), int(mask.sum()))
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    pieces = [order[:cut], order[cut:]]
    for piece in pieces:
        assert torch.equal(token_weights(mask[piece], how, 5, totals=totals), whole[piece])
    total = sum(reduced(losses[p], whole[p], mask[p]) for p in pieces)
    assert total == pytest.approx(reduced(losses, whole, mask), abs=1e-12)


@pytest.mark.parametrize("how", HOW)
@settings(deadline=None, max_examples=50)
@given(rows=masks)
def test_weights_are_zero_behind_the_mask_and_sum_to_what_they_should(how, rows):
    """token and sequence are means: they sum to 1; sequence gives each reply with a token the same share."""
    mask = torch.tensor(rows, dtype=torch.bool)
    weights = token_weights(mask, how, 5)
    assert weights.shape == mask.shape
    assert weights.isfinite().all()
    assert weights[~mask].eq(0).all()
    assert weights[mask].gt(0).all()
    some = mask.any(1)
    if not some.any():
        return
    if how == "sequence":
        assert weights.sum(1)[some].tolist() == pytest.approx([1 / int(some.sum())] * int(some.sum()))
    else:
        assert weights[mask].unique().numel() == 1
        assert float(weights.sum()) == pytest.approx(1 if how == "token" else int(mask.sum()) / int(some.sum()) / 5)


@pytest.mark.parametrize("how", HOW)
def test_rows_without_a_token_do_not_count(how):
    """As after truncation = mask: they leave numerator and denominator."""
    padded = torch.cat([EXAMPLE_MASK, torch.zeros(3, 3, dtype=torch.bool)])
    assert torch.equal(token_weights(padded, how, 4)[:2], token_weights(EXAMPLE_MASK, how, 4))
    assert token_weights(torch.zeros(2, 3, dtype=torch.bool), how, 4).eq(0).all()


def test_extra_padding_columns_do_not_change_weights():
    wide = torch.cat([EXAMPLE_MASK, torch.zeros(2, 9, dtype=torch.bool)], 1)
    for how in HOW:
        assert torch.equal(token_weights(wide, how, 4)[:, :3], token_weights(EXAMPLE_MASK, how, 4))


def test_an_unknown_way_names_the_choices():
    with pytest.raises(ValueError, match=r"'mean': choose token, sequence or constant"):
        token_weights(EXAMPLE_MASK, "mean", 4)
