"""Credit assignment: GAE is the double sum over the tokens that exist, group estimators are the textbook's numbers."""

import inspect
import itertools
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
ONE_SCORE = {"maxrl": maxrl, "pass_at_k": pass_at_k}  # no pay on any token but the last
BY_GROUP = GROUP | ONE_SCORE | {"opo": opo, "best_only": best_only, "reinforce_pp_baseline": reinforce_pp_baseline}
RAGGED = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]
HOLES = [[1, 0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
BAD = float("nan")


def problem(rows: list[list[int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 rewards on every token, values, and the mask; NaN wherever no token is."""
    g, mask = torch.Generator().manual_seed(seed), torch.tensor(rows, dtype=torch.bool)
    x, v = torch.randn(2, *mask.shape, generator=g, dtype=torch.float64).masked_fill(~mask, BAD)
    return x, v, mask


def on_last(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The score on each row's last token."""
    rewards = torch.zeros(mask.shape, dtype=scores.dtype)
    for row, score in enumerate(scores):
        rewards[row, mask[row].nonzero().max()] = score
    return rewards


def double_sum(r: list[float], v: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} - V_{t+l}), V after the last = 0: eq. 16, one episode."""
    v = [*v, 0.0]
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))]


# GAE
@pytest.mark.parametrize("rows", [RAGGED, HOLES], ids=["ragged", "holes"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.97, 0.0), (1.0, 0.0)])
def test_gae_is_the_double_sum_over_the_tokens_that_exist(rows, gamma, lam):
    """Each row's tokens, closed up, are one episode; NaN between and behind them is never seen."""
    rewards, values, mask = problem(rows)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, whiten=False)
    for row, m in enumerate(mask):
        r, v = rewards[row][m].tolist(), values[row][m].tolist()
        expected = torch.tensor(double_sum(r, v, gamma, lam), dtype=torch.float64)
        torch.testing.assert_close(advantages[row][m], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(returns[row][m], expected + values[row][m], atol=1e-12, rtol=0)
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
    for row, m in enumerate(mask):
        r, n = rewards[row][m], int(m.sum())
        for t in range(n):
            to_go = sum(gamma ** (s - t) * float(r[s]) for s in range(t, n))
            assert float(returns[row, t]) == pytest.approx(to_go, abs=1e-12)
            assert float(advantages[row, t]) == pytest.approx(to_go - float(values[row, t]), abs=1e-12)


def test_gae_values_after_the_last_token_are_zero():
    """One token, γ = 1: advantage = reward - V, whatever the value tensor holds to the right of it."""
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
    whitened_too, same_targets = gae(rewards, values, mask, lam=0.8, lam_critic=1.0)
    assert torch.equal(same_targets, monte_carlo)
    assert torch.equal(whitened_too, whitened(plain, mask))


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
    ("alpha", "lams"), [(0.5, [5 / 7, 1 / 3, 0, 0.6]), (0.1, [0] * 4), (1.0, [6 / 7, 2 / 3, 0, 0.8])]
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
    with pytest.raises(ValueError, match=r"model\.critic"):
        gae(rewards, None, mask)


# Whitening
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
    """[0, 1e-4]: variance 5e-9 is smaller than the 1e-8 under the root, (±5e-5)/√(1.5e-8) = ±0.408."""
    x = torch.tensor([[0.0, 1e-4]], dtype=torch.float64)
    got = whitened(x, torch.ones(1, 2, dtype=torch.bool))
    assert got[0].tolist() == pytest.approx([-0.4082482904638, 0.4082482904638], abs=1e-12)


@pytest.mark.parametrize("tokens", [0, 1])
def test_whitening_fewer_than_two_tokens_gives_zero_and_no_nan(tokens):
    mask = torch.arange(3)[None] < tokens
    assert whitened(torch.full((1, 3), 7.0), mask).eq(0).all()


# Group estimators
EXAMPLE = {  # rewards 1, 2, 4, 9 of one prompt's four samples
    "grpo": [-0.842927, -0.561951, 0.0, 1.404878],
    "dr_grpo": [-3.0, -2.0, 0.0, 5.0],
    "rloo": [-4.0, -2.666667, 0.0, 6.666667],
}


@pytest.mark.parametrize("name", GROUP)
def test_the_textbook_example(name):
    """R = 1 2 4 9 → the table's numbers, on every token of the reply and nowhere else."""
    mask = torch.tensor(RAGGED, dtype=torch.bool)
    scores = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    advantages, returns = GROUP[name](on_last(scores, mask), None, mask, group_size=4)
    assert returns is None
    for row, m in enumerate(mask):
        assert advantages[row][m].tolist() == pytest.approx([EXAMPLE[name][row]] * int(m.sum()), abs=1e-6)
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
    """As when a KL is paid on every token: the advantage is that of the row sums, NaN behind the mask unseen."""
    rewards, _, mask = problem(HOLES)
    sums = torch.stack([r[m].sum() for r, m in zip(rewards, mask, strict=True)])
    once = torch.zeros_like(rewards)
    once[:, 0] = sums
    everywhere = mask.any(1, keepdim=True).expand_as(mask)  # the last row is not there in either
    expected = GROUP[name](once, None, everywhere, group_size=2)[0][:, :1]
    got = GROUP[name](rewards, None, mask, group_size=2)[0]
    torch.testing.assert_close(got, expected.expand_as(got) * mask, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in BY_GROUP), ("grpo", {"scale": "batch"})])
@pytest.mark.parametrize("score", [0.7, 1.0, 0.0])
def test_a_unanimous_group_is_exactly_zero_beside_one_that_is_not(name, options, score):
    """Eight float32 rewards of 0.7 have mean 0.69999999 and std 6e-8: not zero unless it is made so."""
    binary = name == "pass_at_k"
    scores = torch.cat([torch.full((8,), round(score) if binary else score), torch.arange(8.0) % (2 if binary else 8)])
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3] * 4)[:, None]
    got = BY_GROUP[name](on_last(scores, mask), None, mask, group_size=8, **options)[0]
    assert got[:8].eq(0).all()
    assert got[8:].abs().sum() > 0


@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in BY_GROUP), ("grpo", {"scale": "batch"})])
def test_a_group_of_one_is_exactly_zero(name, options):
    mask = torch.tensor(RAGGED, dtype=torch.bool)
    rewards = on_last(torch.tensor([0.0, 1.0, 1.0, 0.0]), mask)
    assert BY_GROUP[name](rewards, None, mask, group_size=1, **options)[0].eq(0).all()


@pytest.mark.parametrize("name", BY_GROUP)
def test_rows_that_do_not_divide_into_groups_are_refused(name):
    mask = torch.tensor(RAGGED, dtype=torch.bool)
    with pytest.raises(ValueError, match="4 rows do not divide into groups of 3"):
        BY_GROUP[name](on_last(torch.ones(4), mask), None, mask, group_size=3)


@pytest.mark.parametrize("name", GROUP | {"opo": opo, "best_only": best_only})
def test_groups_are_consecutive_rows(name):
    """Rows "(n g)": the advantage of a group does not depend on the other group."""
    rewards, _, mask = problem(RAGGED)
    alone = BY_GROUP[name](rewards[2:], None, mask[2:], group_size=2)[0]
    torch.testing.assert_close(BY_GROUP[name](rewards, None, mask, group_size=2)[0][2:], alone, atol=0, rtol=0)


# OPO, MaxRL, pass@k, ReMax, REINFORCE++
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
        (best_only, [9, 2, 4, 9], [0.0, 0.0, 0.0, 0.0]),  # the best two are equal: either could be left out
        (best_only, [0, 0, 1, 0], [0.0, 0.0, 1.0, 0.0]),
        (opo, [1, 2, 4, 9], [-4.3, -3.3, -1.3, 3.7]),  # b = (1·1 + 2·2 + 3·4 + 4·9) / 10 = 5.3
        (maxrl, [1, 2, 4, 9], [-0.75, -0.5, 0.0, 1.25]),
        (maxrl, [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]),
        (maxrl, [0, 0, 0, 1], [-1.0, -1.0, -1.0, 3.0]),
        (pass_at_k, [1, 0, 0, 0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
        (pass_at_k, [1, 1, 1, 0], [0.0, 0.0, 0.0, 0.0]),  # every pair passes: nothing to gain
        (pass_at_k, [1, 0, 1, 0], [5**-0.5, -(5**-0.5), 5**-0.5, -(5**-0.5)]),  # p = 5/6, 1/6 or 1/6 - 1/3, over √5/6
    ],
)
def test_the_textbook_example_of_the_others(estimator, scores, expected):
    rewards, mask = staircase(scores)
    got, targets = estimator(rewards, None, mask, group_size=4)
    assert targets is None
    torch.testing.assert_close(got, on_tokens(expected, mask), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scores", [[1, 2, 4, 9], [3, 3, 1, 0], [-1, -5, -2, -3], [0, 0, 0, 1], [2, 2, 2, 2]])
def test_best_only_is_what_the_groups_best_score_loses_without_a_reply(scores):
    """max@G, leave-one-out: max R - max of the others' R, for each reply."""
    rewards, mask = staircase(scores)
    expected = [max(scores) - max(scores[:i] + scores[i + 1 :]) for i in range(4)]
    got, _ = best_only(rewards, None, mask, group_size=4)
    torch.testing.assert_close(got, on_tokens(expected, mask), atol=0, rtol=0)


def test_best_only_finds_the_best_of_each_group_of_its_own():
    scores = torch.tensor([5.0, 1.0, 6.0, 8.0, 0.0, 0.0])
    mask = torch.ones(6, 2, dtype=torch.bool)
    got = best_only(on_last(scores, mask), None, mask, group_size=2)[0][:, 0]
    assert got.tolist() == [4.0, 0.0, 0.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(("size", "right", "k"), [(4, 1, 1), (4, 2, 2), (5, 1, 3), (6, 2, 3), (6, 1, 6), (5, 3, 2)])
def test_pass_at_k_is_the_mean_over_all_sets_a_reply_is_in(size, right, k):
    """Every set of k passes (1) or not (0), whitened over the sets; a reply gets the mean of those it belongs to."""
    scores = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
    sets = list(itertools.combinations(range(size), k))
    passed = torch.tensor([float(any(scores[i] == 1 for i in s)) for s in sets], dtype=torch.float64)
    std = passed.std(correction=0)
    of_sets = (passed - passed.mean()) / std if std > 0 else 0 * passed
    mine = [torch.tensor([i in s for s in sets]) for i in range(size)]
    expected = [of_sets[m].mean() for m in mine]
    got, _ = pass_at_k(scores[:, None], None, torch.ones(size, 1, dtype=torch.bool), group_size=size, k=k)
    torch.testing.assert_close(got[:, 0], torch.stack(expected), atol=1e-12, rtol=0)


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
    """Which is pay on tokens that are not the last of their row; NaN behind the mask is none."""
    rewards, mask = staircase([1, 0, 0, 0])
    paid = torch.where(mask, rewards - 0.01 * mask, BAD)
    for name, estimator in ADVANTAGES.items():
        estimator(rewards.masked_fill(~mask, BAD), torch.zeros_like(rewards), mask, group_size=4)
        refuses = pytest.raises(ValueError, match=f"{name} .*kl_ref.place=loss") if name in ONE_SCORE else nullcontext()
        with refuses:
            estimator(paid, torch.zeros_like(rewards), mask, group_size=4)


def test_the_last_token_is_the_last_of_the_mask():
    """Of a row with holes too."""
    mask = torch.tensor(HOLES[:2], dtype=torch.bool)
    scores = torch.tensor([1.0, 0.0])
    assert maxrl(on_last(scores, mask), None, mask, group_size=2)[0][mask].abs().eq(1).all()
    with pytest.raises(ValueError, match="maxrl takes one score per reply"):
        maxrl(on_last(scores, mask) + mask * torch.eye(7)[3], None, mask, group_size=2)


@pytest.mark.parametrize("rows", [RAGGED, HOLES], ids=["ragged", "holes"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp_whitens_the_return_to_go(rows, gamma):
    rewards, _, mask = problem(rows)
    expected = torch.zeros_like(rewards)
    for row, m in enumerate(mask):
        r = rewards[row][m].tolist()
        to_go = [sum(gamma ** (s - t) * r[s] for s in range(t, len(r))) for t in range(len(r))]
        expected[row, m] = torch.tensor(to_go, dtype=torch.float64)
    got, targets = reinforce_pp(rewards, None, mask, gamma=gamma)
    assert targets is None
    torch.testing.assert_close(got, whitened(expected, mask), atol=1e-12, rtol=0)


def test_reinforce_pp_baseline_whitens_the_deviations_over_tokens():
    """[-3, -2, 0, 5] on 1, 2, 3 and 4 tokens: token mean 1.3, Bessel variance (9 + 8 + 100 - 16.9) / 9."""
    rewards, mask = staircase([1, 2, 4, 9])
    std = (100.1 / 9 + 1e-8) ** 0.5
    got, _ = reinforce_pp_baseline(rewards, None, mask, group_size=4)
    torch.testing.assert_close(got, on_tokens([(x - 1.3) / std for x in (-3, -2, 0, 5)], mask), atol=1e-12, rtol=0)


def test_remax_subtracts_the_greedy_score_from_the_return_to_go():
    """Greedy 3 of scores 1, 2, 4, 9; and a pay on the way is only that of the tokens before it."""
    rewards, mask = staircase([1, 2, 4, 9])
    greedy = torch.full_like(rewards, 3.0).masked_fill(~mask, BAD)
    got, targets = remax(rewards, greedy, mask)
    assert targets is None
    torch.testing.assert_close(got, on_tokens([-2, -1, 1, 6], mask), atol=1e-12, rtol=0)
    rewards[3, 1] = -0.5
    assert remax(rewards, greedy, mask)[0][3].tolist() == [5.5, 5.5, 6.0, 6.0, 0.0]


def test_remax_without_values_names_the_missing_baseline():
    rewards, mask = staircase([1, 2, 4, 9])
    with pytest.raises(ValueError, match="greedy reply, in `values`"):
        remax(rewards, None, mask)


scores = st.lists(
    st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3)), min_size=6, max_size=6
)  # two groups of three


def spread(values: list[float], rows: list[int] = (0, 1, 2, 3, 4, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(4) < torch.tensor([4, 2, 1, 3, 4, 1])[:, None]
    mask = mask[list(rows)]
    return on_last(torch.tensor(values, dtype=torch.float64)[list(rows)], mask), mask


@pytest.mark.parametrize("name", GROUP)
@settings(deadline=None, max_examples=40)
@given(values=scores, shifts=st.tuples(st.integers(-8, 8), st.integers(-8, 8)))
def test_a_constant_added_to_a_groups_scores_changes_nothing(name, values, shifts):
    moved = [v + shifts[i // 3] for i, v in enumerate(values)]
    before, after = (GROUP[name](*_call(spread(x)), group_size=3)[0] for x in (values, moved))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", GROUP)
@settings(deadline=None, max_examples=40)
@given(values=scores, order=st.permutations([0, 1, 2]), swap=st.booleans())
def test_permuting_rows_within_a_group_and_groups_permutes_the_advantages(name, values, order, swap):
    rows = [*order, *(3 + i for i in order)]
    rows = rows[3:] + rows[:3] if swap else rows
    before = GROUP[name](*_call(spread(values)), group_size=3)[0]
    after = GROUP[name](*_call(spread(values, rows)), group_size=3)[0]
    torch.testing.assert_close(after, before[rows], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", GROUP)
@settings(deadline=None, max_examples=40)
@given(values=scores)
def test_the_advantages_of_a_group_sum_to_zero_and_its_best_is_not_punished(name, values):
    rewards, mask = spread(values)
    advantages = GROUP[name](rewards, None, mask, group_size=3)[0][:, 0]
    for group in (slice(0, 3), slice(3, 6)):
        assert float(advantages[group].sum()) == pytest.approx(0, abs=1e-8)
        best = max(values[group])
        assert all(advantages[i] >= 0 for i in range(*group.indices(6)) if values[i] == best)


def _call(parts: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None, torch.Tensor]:
    rewards, mask = parts
    return rewards, None, mask


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
        kinds = [(p.name, p.kind is p.KEYWORD_ONLY) for p in inspect.signature(f).parameters.values()]
        assert kinds[:4] == [("rewards", False), ("values", False), ("mask", False), ("group_size", True)]
        assert all(keyword for _, keyword in kinds[3:])


def test_the_epsilon_of_grpo_is_too_small_to_be_seen():
    """(R - mean) / std of 1, 2, 4, 9 to six digits: an epsilon of 0.1 would show in the second."""
    rewards, mask = torch.tensor([[1.0], [2.0], [4.0], [9.0]], dtype=torch.float64), torch.ones(4, 1, dtype=torch.bool)
    want = torch.tensor([[-0.842927], [-0.561951], [0.0], [1.404878]], dtype=torch.float64)
    torch.testing.assert_close(ADVANTAGES["grpo"](rewards, None, mask, group_size=4)[0], want, rtol=0, atol=2e-6)


# Rows that are not there
@pytest.mark.parametrize("lost", [0, 2, 3])
@pytest.mark.parametrize(
    ("name", "options"), [*((n, {}) for n in ADVANTAGES), ("grpo", {"scale": "batch"}), ("pass_at_k", {"k": 3})])
def test_a_row_without_a_token_is_not_there_the_others_have_the_advantages_of_the_smaller_group(name, options, lost):
    """No score, no sample: it is in no mean, no std and no count."""
    mask = torch.tensor(RAGGED, dtype=torch.bool)
    scores, values = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64), torch.full(mask.shape, 0.25).double()
    rest = [row for row in range(4) if row != lost]
    rewards = on_last(scores, mask)
    expected = ADVANTAGES[name](rewards[rest], values[rest], mask[rest], group_size=3, **options)[0]
    gone = mask.clone()
    gone[lost] = False
    got = ADVANTAGES[name](rewards.masked_fill(~gone, BAD), values, gone, group_size=4, **options)[0]
    torch.testing.assert_close(got[rest], expected, atol=1e-12, rtol=0)
    assert expected.any() or name in ("pass_at_k", "best_only")  # these see nothing in some groups of three
    assert not got[lost].any()


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name not in ("gae", "remax")])
def test_one_row_that_is_left_of_a_group_or_none_has_no_advantage(name):
    """And neither group touches the third, where two of four are left."""
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
