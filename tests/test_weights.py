"""Weights of tokens: denominators that no cut can change, and corrections for the sampler."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.losses import accepted, token_weights, truncated_importance_weights
from rlkl.types import Batch

F64 = torch.float64

# ------------------------------------------------------------------ denominators

EXAMPLE = torch.tensor([[1.0, 99.0, 99.0], [2.0, 4.0, 6.0]], dtype=F64)  # of one and three tokens
EXAMPLE_MASK = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool)
WAYS = ("token", "sequence", "constant")
masks = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=7)


def reduced(per_token: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> float:
    return float((weights * per_token)[mask].sum())


def test_the_three_ways_to_weigh_tokens():
    """Losses [1] and [2 4 6]: mean of row means, mean of tokens, sum over 2 rows × L = 4."""
    for how, loss in (("sequence", 2.5), ("token", 3.25), ("constant", 1.625)):
        weights = token_weights(EXAMPLE_MASK, how, max_tokens=4)
        assert reduced(EXAMPLE, weights, EXAMPLE_MASK) == pytest.approx(loss, abs=1e-14), how


@pytest.mark.parametrize("how", WAYS)
@settings(deadline=None, max_examples=50)
@given(rows=masks, cut=st.integers(0, 6), seed=st.integers(0, 99))
def test_no_cut_into_micro_batches_changes_the_loss(how, rows, cut, seed):
    """Weights of the whole step, or of its pieces with the totals of the step, are the same."""
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


@pytest.mark.parametrize("how", WAYS)
@settings(deadline=None, max_examples=50)
@given(rows=masks)
def test_weights_are_zero_outside_the_mask_and_sum_to_what_they_should(how, rows):
    """token and sequence are means, which sum to 1; sequence gives each response the same share."""
    mask = torch.tensor(rows, dtype=torch.bool)
    weights = token_weights(mask, how, 5)
    assert weights.shape == mask.shape
    assert weights.isfinite().all()
    assert weights[~mask].eq(0).all()
    assert weights[mask].gt(0).all()
    responses, tokens = int(mask.any(1).sum()), int(mask.sum())
    if not responses:
        return
    if how == "sequence":
        per_response = weights.sum(1)[mask.any(1)]
        assert per_response.tolist() == pytest.approx([1 / responses] * responses)
    else:
        assert weights[mask].unique().numel() == 1
        total = 1 if how == "token" else tokens / responses / 5
        assert float(weights.sum()) == pytest.approx(total)


def test_rows_without_a_token_and_columns_of_padding_do_not_count():
    """As after truncation=mask: an empty row leaves the numerator and the denominator."""
    with_rows = torch.cat([EXAMPLE_MASK, torch.zeros(3, 3, dtype=torch.bool)])
    with_columns = torch.cat([EXAMPLE_MASK, torch.zeros(2, 9, dtype=torch.bool)], 1)
    for how in WAYS:
        expected = token_weights(EXAMPLE_MASK, how, 4)
        assert torch.equal(token_weights(with_rows, how, 4)[:2], expected), how
        assert torch.equal(token_weights(with_columns, how, 4)[:, :3], expected), how
        assert token_weights(torch.zeros(2, 3, dtype=torch.bool), how, 4).eq(0).all(), how


def test_an_unknown_way_names_the_choices():
    with pytest.raises(ValueError, match=r"'mean': choose token, sequence or constant"):
        token_weights(EXAMPLE_MASK, "mean", 4)


# ------------------------------------------------------------------ the sampler is not the trainer

LEVELS = ("token", "sequence", "mean")
RATIOS = [  # pi_old / mu; 99 is outside the mask
    [2.0, 0.5, 3.0, 99.0],
    [0.1, 2.0, 99.0, 99.0],
    [99.0, 99.0, 99.0, 99.0],
]
MASK = [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def ratio_batch(
    ratios: list[list[float]] = RATIOS, mask: list[list[int]] = MASK, junk: float = 99.0
) -> Batch:
    """A float64 batch with these pi_old/mu; `junk` is the sampler's log-prob outside the mask."""
    inside = torch.tensor(mask, dtype=torch.bool)
    old = -torch.linspace(0.1, 4, inside.numel(), dtype=F64).view(inside.shape)
    sampler = (old - torch.tensor(ratios, dtype=F64).log()).masked_fill(~inside, junk)
    ids = inside.long()
    return Batch(ids, inside, ids, inside, sampler, ~inside[:, 0], old_logprobs=old)


def tokens_of(x: torch.Tensor) -> list[list[float]]:
    """What is inside the mask, row by row."""
    return [row[inside].tolist() for row, inside in zip(x, torch.tensor(MASK).bool(), strict=True)]


def test_truncated_importance_weights_by_hand():
    """min(pi_old/mu, cap): only large weights are truncated; what pi_old makes rare stays small."""
    for level, cap, expected in (
        ("token", 2.5, [[2.0, 0.5, 2.5], [0.1, 2.0], []]),
        ("token", 1.0, [[1.0, 0.5, 1.0], [0.1, 1.0], []]),
        ("token", 1e9, [[2.0, 0.5, 3.0], [0.1, 2.0], []]),
        ("sequence", 10.0, [[3.0] * 3, [0.2] * 2, []]),  # the products
        ("sequence", 2.0, [[2.0] * 3, [0.2] * 2, []]),
    ):
        weights = truncated_importance_weights(ratio_batch(), level, cap)
        assert weights.shape == (3, 4)
        for row, expected_row in zip(tokens_of(weights), expected, strict=True):
            assert row == pytest.approx(expected_row, abs=1e-12), (level, cap)


def test_what_is_accepted_by_hand():
    """Products 3 and 0.2; geometric means 3^(1/3) = 1.442 and 0.2^(1/2) = 0.447."""
    for level, low, high, expected in (
        ("token", 0.4, 2.5, [[1, 1, 0], [0, 1], []]),
        ("token", 0.0, 100.0, [[1, 1, 1], [1, 1], []]),
        ("token", 0.6, 1.9, [[0, 0, 0], [0, 0], []]),
        ("sequence", 0.5, 2.0, [[0, 0, 0], [0, 0], []]),
        ("sequence", 0.1, 2.0, [[0, 0, 0], [1, 1], []]),
        ("sequence", 0.5, 3.5, [[1, 1, 1], [0, 0], []]),
        ("mean", 0.5, 2.0, [[1, 1, 1], [0, 0], []]),
        ("mean", 0.44, 1.4, [[0, 0, 0], [1, 1], []]),
        ("mean", 0.44, 1.45, [[1, 1, 1], [1, 1], []]),
    ):
        inside = accepted(ratio_batch(), level, low, high)
        assert inside.dtype == torch.bool
        assert inside.shape == (3, 4)
        assert tokens_of(inside) == [[bool(x) for x in row] for row in expected], (level, low, high)


@pytest.mark.parametrize("level", LEVELS)
def test_where_the_sampler_agrees_the_weight_is_exactly_one_and_both_bounds_are_accepted(level):
    batch = ratio_batch([[1.0, 1.0]], [[1, 1]])
    batch.sampler_logprobs = batch.old_logprobs
    for low, high in ((1.0, 1.0), (0.5, 1.0), (1.0, 2.0)):
        assert accepted(batch, level, low, high).all()
    assert not accepted(batch, level, 1.0001, 2.0).any()
    assert not accepted(batch, level, 0.5, 0.9999).any()
    if level != "mean":
        batch = ratio_batch()
        batch.sampler_logprobs = batch.old_logprobs
        assert truncated_importance_weights(batch, level, 2.0).eq(1).all()


@pytest.mark.parametrize("level", LEVELS)
def test_junk_outside_the_mask_changes_nothing_and_is_never_accepted(level):
    for junk in (0.0, -1e9, math.inf, -math.inf, math.nan):
        batch = ratio_batch(junk=junk)
        assert torch.equal(accepted(batch, level, 0.0, 1e9), batch.mask), junk
        if level != "mean":
            weights = truncated_importance_weights(batch, level, 5.0)
            expected = truncated_importance_weights(ratio_batch(), level, 5.0)
            assert weights.isfinite().all(), junk
            assert torch.equal(weights, expected), junk


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_without_a_token_has_weight_one_and_nothing_to_accept(level):
    batch = ratio_batch([[3.0, 3.0]], [[0, 0]])
    assert not accepted(batch, level, 0.0, 1e9).any()
    if level != "mean":
        assert truncated_importance_weights(batch, level, 2.0).eq(1).all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_sampler_that_is_far_off_overflows_nothing(level):
    """The log-ratio is clamped to ±20 after the sum, so the cap and the bounds decide."""
    for sign, weight in ((1.0, 2.0), (-1.0, math.exp(-20))):
        batch = ratio_batch([[1.0] * 3], [[1, 1, 1]])
        batch.old_logprobs = batch.sampler_logprobs + sign * 1e4
        assert not accepted(batch, level, 1e-6, 1e6).any()
        assert accepted(batch, level, 0.0, 1e9).all()  # exp(±20) itself is within such bounds
        if level != "mean":
            weights = truncated_importance_weights(batch, level, 2.0)
            assert weights[0].tolist() == pytest.approx([weight] * 3)
            assert truncated_importance_weights(batch, level, math.inf).isfinite().all()


def test_one_token_far_off_rejects_its_response_but_not_its_geometric_mean():
    """Eleven tokens that agree and one off by a factor of 3: the product is 3, the mean 1.096."""
    batch = ratio_batch([[1.0] * 11 + [3.0]], [[1] * 12])
    assert not accepted(batch, "sequence", 0.5, 2.0).any()
    assert accepted(batch, "mean", 0.5, 2.0).all()
    assert accepted(batch, "token", 0.5, 2.0)[0].tolist() == [True] * 11 + [False]


def test_neither_writes_to_the_batch():
    batch = ratio_batch()
    before = batch.old_logprobs.clone(), batch.sampler_logprobs.clone()
    truncated_importance_weights(batch, "sequence", 2.0)
    accepted(batch, "mean", 0.5, 2.0)
    assert torch.equal(batch.old_logprobs, before[0])
    assert torch.equal(batch.sampler_logprobs, before[1])
