"""Advantages: GAE is the double sum over the tokens that exist; group estimators by hand."""

import inspect
import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.advantages import (
    ADVANTAGES,
    best_only,
    dr_grpo,
    gae,
    grpo,
    maxrl,
    opo,
    pass_at_k,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
    whitened,
)

GROUP = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
ONE_SCORE = {"maxrl": maxrl, "pass_at_k": pass_at_k}  # they refuse rewards before the last token
OTHERS = {"opo": opo, "best_only": best_only, "reinforce_pp_baseline": reinforce_pp_baseline}
BY_GROUP = GROUP | ONE_SCORE | OTHERS
BY_GROUP_WITH_OPTIONS = [*((name, {}) for name in BY_GROUP), ("grpo", {"scale": "batch"})]
RAGGED = [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 0, 0, 0, 0],
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 0, 0],
]
HOLES = [[1, 0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
BAD = float("nan")


def problem(
    rows: list[list[int]], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 rewards on every token, values, and the mask; NaN outside the mask."""
    g, mask = torch.Generator().manual_seed(seed), torch.tensor(rows, dtype=torch.bool)
    both = torch.randn(2, *mask.shape, generator=g, dtype=torch.float64)
    rewards, values = both.masked_fill(~mask, BAD)
    return rewards, values, mask


def on_last(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The score on each row's last token."""
    rewards = torch.zeros(mask.shape, dtype=scores.dtype)
    for row, score in enumerate(scores):
        rewards[row, mask[row].nonzero().max()] = score
    return rewards


def discounted_sums(x: list[float], discount: float) -> list[float]:
    """Σ_{s >= t} discount^(s - t) x_s for each t, term by term."""
    steps = range(len(x))
    return [sum(discount ** (s - t) * x[s] for s in steps if s >= t) for t in steps]


def double_sum(r: list[float], v: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} - V_{t+l}), one episode: eq. 16. V ends with 0."""
    v = [*v, 0.0]
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    return discounted_sums(delta, gamma * lam)


# ------------------------------------------------------------------ GAE


@pytest.mark.parametrize("rows", [RAGGED, HOLES], ids=["ragged", "holes"])
def test_gae_is_the_double_sum_over_the_tokens_that_exist(rows):
    """Each row's tokens, closed up, are one episode; NaN between and behind them is never seen."""
    rewards, values, mask = problem(rows)
    for gamma, lam in ((1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.97, 0.0), (1.0, 0.0)):
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, whiten=False)
        for row, inside in enumerate(mask):
            v = values[row][inside]
            expected = double_sum(rewards[row][inside].tolist(), v.tolist(), gamma, lam)
            expected = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(advantages[row][inside], expected, atol=1e-12, rtol=0)
            torch.testing.assert_close(returns[row][inside], expected + v, atol=1e-12, rtol=0)
        assert advantages[~mask].eq(0).all()
        assert returns[~mask].eq(0).all()


def test_gae_with_holes_equals_gae_on_the_closed_up_row():
    rewards, values, mask = problem(HOLES[:1])
    holed = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    short = torch.ones(1, int(mask.sum()), dtype=torch.bool)
    closed = gae(rewards[mask][None], values[mask][None], short, gamma=0.9, lam=0.8)
    for a, b in zip(holed, closed, strict=True):
        torch.testing.assert_close(a[mask], b[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_at_lambda_one_is_return_minus_value(gamma):
    rewards, values, mask = problem(RAGGED)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0, whiten=False)
    for row, inside in enumerate(mask):
        to_go = discounted_sums(rewards[row][inside].tolist(), gamma)
        to_go = torch.tensor(to_go, dtype=torch.float64)
        torch.testing.assert_close(returns[row][inside], to_go, atol=1e-12, rtol=0)
        expected = to_go - values[row][inside]
        torch.testing.assert_close(advantages[row][inside], expected, atol=1e-12, rtol=0)


def test_gae_values_after_the_last_token_are_zero():
    """One token, γ = 1: advantage = reward - V, whatever the values hold to the right of it."""
    rewards = torch.tensor([[2.0, 50.0]])
    values = torch.tensor([[0.5, 99.0]])
    advantages, _ = gae(rewards, values, torch.tensor([[True, False]]), whiten=False)
    assert advantages.tolist() == [[1.5, 0.0]]


def test_lam_critic_moves_the_value_targets_and_not_the_advantages():
    rewards, values, mask = problem(HOLES)
    plain, _ = gae(rewards, values, mask, lam=0.8, whiten=False)
    _, monte_carlo = gae(rewards, values, mask, lam=1.0, whiten=False)
    advantages, targets = gae(rewards, values, mask, lam=0.8, lam_critic=1.0, whiten=False)
    assert torch.equal(advantages, plain)
    assert torch.equal(targets, monte_carlo)
    advantages, targets = gae(rewards, values, mask, lam=0.8, lam_critic=1.0)
    assert torch.equal(targets, monte_carlo)
    assert torch.equal(advantages, whitened(plain, mask))


def test_lam_critic_zero_is_not_the_default():
    """0 is a λ of its own: targets r + γV', not those of lam."""
    rewards, values, mask = problem(RAGGED)
    _, one_step = gae(rewards, values, mask, lam=0.9, lam_critic=0.0)
    assert torch.equal(one_step, gae(rewards, values, mask, lam=0.0)[1])


def test_gae_whitens_by_default_and_never_the_returns():
    rewards, values, mask = problem(RAGGED)
    raw, returns = gae(rewards, values, mask, whiten=False)
    advantages, same = gae(rewards, values, mask)
    assert torch.equal(advantages, whitened(raw, mask))
    assert not torch.allclose(advantages, raw)
    assert torch.equal(returns, same)


@pytest.mark.parametrize(
    ("alpha", "lams"),
    [(0.5, [5 / 7, 1 / 3, 0, 0.6]), (0.1, [0] * 4), (1.0, [6 / 7, 2 / 3, 0, 0.8])],
)
def test_lam_alpha_gives_each_row_the_lambda_of_its_length(alpha, lams):
    """1 - 1/max(α·length, 1), rows of 7, 3, 1 and 5 tokens; `lam` is then not read."""
    rewards, values, mask = problem(RAGGED)
    got, _ = gae(rewards, values, mask, lam=0.123, lam_alpha=alpha, whiten=False)
    for row, lam in enumerate(lams):
        one, _ = gae(rewards[[row]], values[[row]], mask[[row]], lam=lam, whiten=False)
        torch.testing.assert_close(got[[row]], one, atol=1e-6, rtol=0)


def test_gae_without_values_names_the_missing_critic():
    rewards, _, mask = problem(RAGGED)
    with pytest.raises(ValueError, match=r"critic\.kind"):
        gae(rewards, None, mask)


# ------------------------------------------------------------------ whitening


@pytest.mark.parametrize("rows", [RAGGED, HOLES], ids=["ragged", "holes"])
def test_whitening_has_zero_mean_and_unit_bessel_variance_over_the_mask(rows):
    x, _, mask = problem(rows)
    inside = whitened(3 * x + 5, mask)[mask]
    n = len(inside)
    assert float(inside.sum() / n) == pytest.approx(0, abs=1e-14)
    assert float(inside.square().sum() / (n - 1)) == pytest.approx(1, abs=1e-8)
    assert float(inside.square().sum() / n) != pytest.approx(1, abs=1e-2)
    assert whitened(x, mask)[~mask].eq(0).all()


def test_whitening_divides_by_the_root_of_variance_plus_1e_8():
    """[0, 1e-4]: the variance, 5e-9, is smaller than 1e-8; (±5e-5)/√(1.5e-8) = ±0.408."""
    x = torch.tensor([[0.0, 1e-4]], dtype=torch.float64)
    got = whitened(x, torch.ones(1, 2, dtype=torch.bool))
    assert got[0].tolist() == pytest.approx([-0.4082482904638, 0.4082482904638], abs=1e-12)


@pytest.mark.parametrize("tokens", [0, 1])
def test_whitening_fewer_than_two_tokens_gives_zero_and_no_nan(tokens):
    mask = torch.arange(3)[None] < tokens
    assert whitened(torch.full((1, 3), 7.0), mask).eq(0).all()


# ------------------------------------------------------------------ group estimators

EXAMPLE = {  # rewards 1, 2, 4, 9 of one prompt's four samples
    "grpo": [-0.842927, -0.561951, 0.0, 1.404878],
    "dr_grpo": [-3.0, -2.0, 0.0, 5.0],
    "rloo": [-4.0, -2.666667, 0.0, 6.666667],
}


@pytest.mark.parametrize("name", GROUP)
def test_the_textbook_example(name):
    """R = 1 2 4 9 → the numbers above, on every token of the response and nowhere else."""
    mask = torch.tensor(RAGGED, dtype=torch.bool)
    scores = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    advantages, returns = GROUP[name](on_last(scores, mask), None, mask, group_size=4)
    assert returns is None
    for row, inside in enumerate(mask):
        expected = [EXAMPLE[name][row]] * int(inside.sum())
        assert advantages[row][inside].tolist() == pytest.approx(expected, abs=1e-6)
    assert advantages[~mask].eq(0).all()


def test_grpo_divides_by_bessel_std_plus_1e_6():
    """Two rewards 0 and 2e-6: std = √2·1e-6, so ∓1e-6 / (2.414e-6) = ∓0.41421356."""
    scores = torch.tensor([0.0, 2e-6], dtype=torch.float64)
    mask = torch.ones(2, 1, dtype=torch.bool)
    got = grpo(scores[:, None], None, mask, group_size=2)[0][:, 0]
    assert got.tolist() == pytest.approx([-(2**0.5 - 1), 2**0.5 - 1], abs=1e-9)


def test_grpo_by_the_batch_uses_each_groups_mean_and_one_std():
    """Groups (1, 3) and (10, 20): deviations ∓1, ∓5 over the std of all four, √(223/3) = 8.5829…"""
    scores = torch.tensor([1.0, 3.0, 10.0, 20.0], dtype=torch.float64)
    mask = torch.ones(4, 2, dtype=torch.bool)
    got = grpo(on_last(scores, mask), None, mask, group_size=2, scale="batch")[0]
    std = (((scores - 8.5) ** 2).sum() / 3).sqrt()
    expected = torch.tensor([-1.0, 1.0, -5.0, 5.0], dtype=torch.float64) / (std + 1e-6)
    torch.testing.assert_close(got, expected[:, None].expand(4, 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", GROUP)
def test_rewards_on_several_tokens_are_summed_before_the_baseline(name):
    """As with a KL in the reward: the advantage is that of the row sums. NaN is never seen."""
    rewards, _, mask = problem(HOLES)
    sums = torch.stack([r[m].sum() for r, m in zip(rewards, mask, strict=True)])
    once = torch.zeros_like(rewards)
    once[:, 0] = sums
    everywhere = mask.any(1, keepdim=True).expand_as(mask)  # the last row is not there in either
    expected = GROUP[name](once, None, everywhere, group_size=2)[0][:, :1]
    got = GROUP[name](rewards, None, mask, group_size=2)[0]
    torch.testing.assert_close(got, expected.expand_as(got) * mask, atol=1e-12, rtol=0)


def test_a_group_of_zero_variance_is_exactly_zero_beside_one_that_is_not():
    """Eight float32 rewards of 0.7 have mean 0.69999999 and std 6e-8, so 0 takes some care."""
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3] * 4)[:, None]
    for name, options in BY_GROUP_WITH_OPTIONS:
        for score in (0.7, 1.0, 0.0):
            equal, different = torch.full((8,), score), torch.arange(8.0)
            if name == "pass_at_k":  # scores of 0 and 1 only
                equal, different = equal.round(), different % 2
            rewards = on_last(torch.cat([equal, different]), mask)
            advantages, _ = BY_GROUP[name](rewards, None, mask, group_size=8, **options)
            assert advantages[:8].eq(0).all(), (name, options, score)
            assert advantages[8:].abs().sum() > 0, (name, options, score)


def test_a_group_of_one_is_exactly_zero():
    mask = torch.tensor(RAGGED, dtype=torch.bool)
    rewards = on_last(torch.tensor([0.0, 1.0, 1.0, 0.0]), mask)
    for name, options in BY_GROUP_WITH_OPTIONS:
        advantages, _ = BY_GROUP[name](rewards, None, mask, group_size=1, **options)
        assert advantages.eq(0).all(), (name, options)


def test_rows_that_do_not_divide_into_groups_are_refused():
    mask = torch.tensor(RAGGED, dtype=torch.bool)
    for estimator in BY_GROUP.values():
        with pytest.raises(ValueError, match="4 rows do not divide into groups of 3"):
            estimator(on_last(torch.ones(4), mask), None, mask, group_size=3)


@pytest.mark.parametrize("name", [*GROUP, "opo", "best_only"])
def test_groups_are_consecutive_rows(name):
    """Rows "(n g)": the advantage of a group does not depend on the other group."""
    rewards, _, mask = problem(RAGGED)
    alone, _ = BY_GROUP[name](rewards[2:], None, mask[2:], group_size=2)
    both, _ = BY_GROUP[name](rewards, None, mask, group_size=2)
    torch.testing.assert_close(both[2:], alone, atol=0, rtol=0)


# ------------------------------------------------------------------ the other estimators


def staircase(scores: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """One group of four, of 1, 2, 3 and 4 tokens, scored on the last one: (rewards, mask)."""
    mask = torch.arange(5) < torch.tensor([1, 2, 3, 4])[:, None]
    return on_last(torch.tensor(scores, dtype=torch.float64), mask), mask


def on_tokens(per_row: list[float], mask: torch.Tensor) -> torch.Tensor:
    return torch.tensor(per_row, dtype=torch.float64)[:, None] * mask


@pytest.mark.parametrize(
    ("estimator", "scores", "expected"),
    [
        (best_only, [1, 2, 4, 9], [0.0, 0.0, 0.0, 5.0]),
        (best_only, [7, -3, 4, 2], [3.0, 0.0, 0.0, 0.0]),
        (best_only, [-1, -2, -4, -9], [1.0, 0.0, 0.0, 0.0]),
        (best_only, [9, 2, 4, 9], [0.0, 0.0, 0.0, 0.0]),  # the best two are equal
        (best_only, [0, 0, 1, 0], [0.0, 0.0, 1.0, 0.0]),
        (opo, [1, 2, 4, 9], [-4.3, -3.3, -1.3, 3.7]),  # b = (1·1 + 2·2 + 3·4 + 4·9) / 10 = 5.3
        (maxrl, [1, 2, 4, 9], [-0.75, -0.5, 0.0, 1.25]),
        (maxrl, [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]),
        (maxrl, [0, 0, 0, 1], [-1.0, -1.0, -1.0, 3.0]),
        (pass_at_k, [1, 0, 0, 0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
        (pass_at_k, [1, 1, 1, 0], [0.0, 0.0, 0.0, 0.0]),  # every pair passes: nothing to gain
        # p = 5/6: 1/6 or 1/6 - 1/3, over √5/6
        (pass_at_k, [1, 0, 1, 0], [5**-0.5, -(5**-0.5), 5**-0.5, -(5**-0.5)]),
    ],
)
def test_the_textbook_example_of_the_others(estimator, scores, expected):
    rewards, mask = staircase(scores)
    got, targets = estimator(rewards, None, mask, group_size=4)
    assert targets is None
    torch.testing.assert_close(got, on_tokens(expected, mask), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "scores", [[1, 2, 4, 9], [3, 3, 1, 0], [-1, -5, -2, -3], [0, 0, 0, 1], [2, 2, 2, 2]]
)
def test_best_only_is_what_the_groups_best_score_loses_without_a_response(scores):
    """max@G, leave-one-out: max R - max of the others' R, for each response."""
    rewards, mask = staircase(scores)
    expected = [max(scores) - max(scores[:i] + scores[i + 1 :]) for i in range(4)]
    got, _ = best_only(rewards, None, mask, group_size=4)
    torch.testing.assert_close(got, on_tokens(expected, mask), atol=0, rtol=0)


def test_best_only_finds_the_best_of_each_group_of_its_own():
    scores = torch.tensor([5.0, 1.0, 6.0, 8.0, 0.0, 0.0])
    mask = torch.ones(6, 2, dtype=torch.bool)
    got = best_only(on_last(scores, mask), None, mask, group_size=2)[0][:, 0]
    assert got.tolist() == [4.0, 0.0, 0.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("size", "right", "k"), [(4, 1, 1), (4, 2, 2), (5, 1, 3), (6, 2, 3), (6, 1, 6), (5, 3, 2)]
)
def test_pass_at_k_is_the_mean_over_all_sets_a_response_is_in(size, right, k):
    """A set of k scores 1 if one of it is right, else 0; the scores of all sets are standardised.

    The advantage of a response is the mean over the sets that it is in.
    """
    sets = list(itertools.combinations(range(size), k))
    member = torch.tensor([[i in chosen for chosen in sets] for i in range(size)])
    passed = member[:right].any(0).double()
    std = passed.std(correction=0)
    of_sets = (passed - passed.mean()) / std if std > 0 else 0 * passed
    expected = (member * of_sets).sum(1) / member.sum(1)

    scores = (torch.arange(size) < right).double()[:, None]
    mask = torch.ones(size, 1, dtype=torch.bool)
    advantages, _ = pass_at_k(scores, None, mask, group_size=size, k=k)
    torch.testing.assert_close(advantages[:, 0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_a_k_that_no_group_has(k):
    rewards, mask = staircase([1, 0, 0, 0])
    with pytest.raises(ValueError, match=f"k is {k}, group_size 4"):
        pass_at_k(rewards, None, mask, group_size=4, k=k)


def test_scores_that_mean_nothing_to_an_estimator_are_refused():
    for estimator, scores, message in (
        (pass_at_k, [1, 0, 0.7, 0], r"0 \(wrong\) or 1 \(right\); one is 0\.7"),
        (maxrl, [1, 0, -0.5, 0], r">= 0; one is -0\.5"),
    ):
        rewards, mask = staircase(scores)
        with pytest.raises(ValueError, match=message):
            estimator(rewards, None, mask, group_size=4)


def test_maxrl_and_pass_at_k_alone_refuse_a_kl_in_the_reward():
    """A KL pays tokens before the last one. NaN outside the mask is no reward."""
    rewards, mask = staircase([1, 0, 0, 0])
    paid = torch.where(mask, rewards - 0.01 * mask, BAD)
    for name, estimator in ADVANTAGES.items():
        estimator(rewards.masked_fill(~mask, BAD), torch.zeros_like(rewards), mask, group_size=4)
        expectation = nullcontext()
        if name in ONE_SCORE:
            expectation = pytest.raises(ValueError, match=f"{name} .*kl_ref.place=loss")
        with expectation:
            estimator(paid, torch.zeros_like(rewards), mask, group_size=4)


def test_the_last_token_is_the_last_of_the_mask():
    """In a row with holes too."""
    mask = torch.tensor(HOLES[:2], dtype=torch.bool)
    scores = torch.tensor([1.0, 0.0])
    assert maxrl(on_last(scores, mask), None, mask, group_size=2)[0][mask].abs().eq(1).all()
    with pytest.raises(ValueError, match="maxrl takes one score per response"):
        maxrl(on_last(scores, mask) + mask * torch.eye(7)[3], None, mask, group_size=2)


@pytest.mark.parametrize("name", ["maxrl", "pass_at_k"])
def test_a_second_reward_on_the_token_before_the_last_is_refused(name):
    rewards = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="one score per response"):
        ADVANTAGES[name](rewards, None, torch.ones(2, 3, dtype=torch.bool), group_size=2)


@pytest.mark.parametrize("rows", [RAGGED, HOLES], ids=["ragged", "holes"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp_whitens_the_return_to_go(rows, gamma):
    rewards, _, mask = problem(rows)
    expected = torch.zeros_like(rewards)
    for row, inside in enumerate(mask):
        to_go = discounted_sums(rewards[row][inside].tolist(), gamma)
        expected[row, inside] = torch.tensor(to_go, dtype=torch.float64)
    got, targets = reinforce_pp(rewards, None, mask, gamma=gamma)
    assert targets is None
    torch.testing.assert_close(got, whitened(expected, mask), atol=1e-12, rtol=0)


def test_reinforce_pp_baseline_whitens_the_deviations_over_tokens():
    """[-3, -2, 0, 5] on 1, 2, 3, 4 tokens: mean 1.3, Bessel variance (9 + 8 + 100 - 16.9) / 9."""
    rewards, mask = staircase([1, 2, 4, 9])
    std = (100.1 / 9 + 1e-8) ** 0.5
    expected = on_tokens([(x - 1.3) / std for x in (-3, -2, 0, 5)], mask)
    got, _ = reinforce_pp_baseline(rewards, None, mask, group_size=4)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_remax_subtracts_the_greedy_score_from_the_return_to_go():
    """Greedy 3 of scores 1, 2, 4, 9. A reward on the way counts for the tokens up to it."""
    rewards, mask = staircase([1, 2, 4, 9])
    greedy = torch.full_like(rewards, 3.0).masked_fill(~mask, BAD)
    got, targets = remax(rewards, greedy, mask)
    assert targets is None
    torch.testing.assert_close(got, on_tokens([-2, -1, 1, 6], mask), atol=1e-12, rtol=0)
    rewards[3, 1] = -0.5
    assert remax(rewards, greedy, mask)[0][3].tolist() == [5.5, 5.5, 6.0, 6.0, 0.0]


def test_remax_without_values_names_the_missing_baseline():
    rewards, mask = staircase([1, 2, 4, 9])
    with pytest.raises(ValueError, match="greedy response, in `values`"):
        remax(rewards, None, mask)


# ------------------------------------------------------------------ properties

hundredths = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))
scores_of_two_groups = st.lists(hundredths, min_size=6, max_size=6)


def advantages_of_six(name: str, scores: list[float], rows: Sequence[int] = range(6)):
    """(6, 4) advantages of two groups of three, with the rows in this order."""
    rows = list(rows)
    mask = torch.arange(4) < torch.tensor([4, 2, 1, 3, 4, 1])[rows][:, None]
    rewards = on_last(torch.tensor(scores, dtype=torch.float64)[rows], mask)
    return GROUP[name](rewards, None, mask, group_size=3)[0]


@pytest.mark.parametrize("name", GROUP)
@settings(deadline=None, max_examples=40)
@given(
    scores=scores_of_two_groups,
    shifts=st.tuples(st.integers(-8, 8), st.integers(-8, 8)),
    order=st.permutations([0, 1, 2]),
    swap=st.booleans(),
)
def test_group_advantages_are_relative_to_the_group(name, scores, shifts, order, swap):
    """They sum to 0, the best is never punished, and a constant added to a group changes nothing.

    Rows in another order within their group, and groups in another order, keep their advantages.
    """
    advantages = advantages_of_six(name, scores)
    for group in (slice(0, 3), slice(3, 6)):
        assert float(advantages[group, 0].sum()) == pytest.approx(0, abs=1e-8)
        group_scores = torch.tensor(scores[group])
        assert (advantages[group, 0][group_scores == group_scores.max()] >= 0).all()

    shifted = [score + shifts[i // 3] for i, score in enumerate(scores)]
    torch.testing.assert_close(advantages_of_six(name, shifted), advantages, atol=1e-6, rtol=1e-6)

    rows = [*order, *(3 + i for i in order)]
    rows = rows[3:] + rows[:3] if swap else rows
    permuted = advantages_of_six(name, scores, rows)
    torch.testing.assert_close(permuted, advantages[rows], atol=1e-9, rtol=1e-9)


def test_no_estimator_writes_to_its_arguments():
    rewards, values, mask = problem(RAGGED)
    rewards = on_last(torch.tensor([0.0, 1.0, 1.0, 0.0]), mask).masked_fill(~mask, BAD)
    kept = [x.clone() for x in (rewards, values, mask)]
    for f in ADVANTAGES.values():
        f(rewards, values, mask, group_size=2)
    for before, after in zip(kept, (rewards, values, mask), strict=True):
        assert torch.equal(before.nan_to_num(99.0), after.nan_to_num(99.0))


def test_the_table_is_complete_and_its_options_are_keywords():
    assert {f.__name__: f for f in ADVANTAGES.values()} == ADVANTAGES
    for f in ADVANTAGES.values():
        parameters = list(inspect.signature(f).parameters.values())
        assert [p.name for p in parameters[:4]] == ["rewards", "values", "mask", "group_size"]
        keyword_only = [p.kind is p.KEYWORD_ONLY for p in parameters]
        assert keyword_only == [False] * 3 + [True] * (len(parameters) - 3)


def test_the_epsilon_of_grpo_is_too_small_to_be_seen():
    """(R - mean) / std of 1, 2, 4, 9 to six digits: an epsilon of 0.1 would show in the second."""
    rewards = torch.tensor([[1.0], [2.0], [4.0], [9.0]], dtype=torch.float64)
    mask = torch.ones(4, 1, dtype=torch.bool)
    expected = torch.tensor([[-0.842927], [-0.561951], [0.0], [1.404878]], dtype=torch.float64)
    advantages, _ = ADVANTAGES["grpo"](rewards, None, mask, group_size=4)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=2e-6)


# ------------------------------------------------------------------ rows without a token


@pytest.mark.parametrize(
    ("name", "options"),
    [*((n, {}) for n in ADVANTAGES), ("grpo", {"scale": "batch"}), ("pass_at_k", {"k": 3})],
)
def test_a_row_without_a_token_is_not_in_its_group(name, options):
    """No score, no sample: it is in no mean, no std and no count. The group is smaller by one."""
    full_mask = torch.tensor(RAGGED, dtype=torch.bool)
    values = torch.full(full_mask.shape, 0.25, dtype=torch.float64)
    rewards = on_last(torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64), full_mask)
    for lost in (0, 2, 3):
        rest = [row for row in range(4) if row != lost]
        expected, _ = ADVANTAGES[name](
            rewards[rest], values[rest], full_mask[rest], group_size=3, **options
        )
        mask = full_mask.clone()
        mask[lost] = False
        with_nan = rewards.masked_fill(~mask, BAD)
        advantages, _ = ADVANTAGES[name](with_nan, values, mask, group_size=4, **options)
        torch.testing.assert_close(advantages[rest], expected, atol=1e-12, rtol=0)
        assert not advantages[lost].any()
        # in some groups of three these two are 0
        assert expected.any() or name in ("pass_at_k", "best_only")


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name not in ("gae", "remax")])
def test_a_group_with_one_row_left_or_none_has_no_advantage(name):
    """And neither changes the third group, where two of four are left."""
    mask = torch.ones(12, 3, dtype=torch.bool)
    mask[[0, 1, 2, 4, 5, 6, 7, 8, 9]] = False
    scores = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.float64)
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    rewards[:, -1] = scores
    got = ADVANTAGES[name](rewards, None, mask, group_size=4)[0]
    assert got.isfinite().all()
    if name != "reinforce_pp":  # no group there: one whitening over all tokens
        assert not got[:8].any()
    assert got[10:].any() or name == "pass_at_k"  # of two, one right, every pair passes
