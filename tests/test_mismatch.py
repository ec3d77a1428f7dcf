"""pi_old against the policy that sampled: weights and masks by hand, at each level."""

import math

import pytest
import torch

from rlkl.mismatch import accepted, truncated_ratio
from rlkl.types import Batch

RATIOS = [[2.0, 0.5, 3.0, 99.0], [0.1, 2.0, 99.0, 99.0], [99.0] * 4]  # pi_old / mu; 99 stands behind the mask
MASK = [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def of(ratios: list[list[float]], mask: list[list[int]], junk: float = math.log(99)) -> Batch:
    """A batch in float64 with these pi_old/mu, and `junk` as the log-prob of what is behind the mask."""
    m = torch.tensor(mask, dtype=torch.bool)
    old = -torch.linspace(0.1, 4, m.numel(), dtype=torch.float64).view(m.shape)
    sampler = (old - torch.tensor(ratios, dtype=torch.float64).log()).masked_fill(~m, junk)
    return Batch(m.long(), m, m.long(), m, sampler, torch.zeros(len(m), dtype=torch.bool), old_logprobs=old)


def rows(x: torch.Tensor) -> list[list[float]]:
    """What is inside the mask, row by row."""
    return [r[m].tolist() for r, m in zip(x, torch.tensor(MASK, dtype=torch.bool), strict=True)]


@pytest.mark.parametrize(
    ("level", "cap", "expected"),
    [
        ("token", 2.5, [[2.0, 0.5, 2.5], [0.1, 2.0], []]),
        ("token", 1.0, [[1.0, 0.5, 1.0], [0.1, 1.0], []]),
        ("token", 1e9, [[2.0, 0.5, 3.0], [0.1, 2.0], []]),
        ("sequence", 10.0, [[3.0] * 3, [0.2] * 2, []]),  # the products
        ("sequence", 2.0, [[2.0] * 3, [0.2] * 2, []]),
    ],
)
def test_the_truncated_ratio_by_hand(level, cap, expected):
    """min(pi_old/mu, cap): truncated from above only, so that what is rare under pi_old keeps its small weight."""
    got = truncated_ratio(of(RATIOS, MASK), level, cap)
    assert got.shape == (3, 4)
    for found, want in zip(rows(got), expected, strict=True):
        assert found == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("level", "low", "high", "expected"),
    [
        ("token", 0.4, 2.5, [[1, 1, 0], [0, 1], []]),
        ("token", 0.0, 100.0, [[1, 1, 1], [1, 1], []]),
        ("token", 0.6, 1.9, [[0, 0, 0], [0, 0], []]),
        ("sequence", 0.5, 2.0, [[0, 0, 0], [0, 0], []]),  # 3 and 0.2
        ("sequence", 0.1, 2.0, [[0, 0, 0], [1, 1], []]),
        ("sequence", 0.5, 3.5, [[1, 1, 1], [0, 0], []]),
        ("mean", 0.5, 2.0, [[1, 1, 1], [0, 0], []]),  # 3^(1/3) = 1.442 and 0.2^(1/2) = 0.447
        ("mean", 0.44, 1.4, [[0, 0, 0], [1, 1], []]),
        ("mean", 0.44, 1.45, [[1, 1, 1], [1, 1], []]),
    ],
)
def test_what_is_accepted_by_hand(level, low, high, expected):
    got = accepted(of(RATIOS, MASK), level, low, high)
    assert got.dtype == torch.bool
    assert got.shape == (3, 4)
    assert rows(got) == [[bool(x) for x in row] for row in expected]


@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
def test_both_ends_are_accepted_and_so_is_a_sampler_that_agrees(level):
    ones = of([[1.0, 1.0]], [[1, 1]])
    ones.sampler_logprobs = ones.old_logprobs
    for low, high in ((1.0, 1.0), (0.5, 1.0), (1.0, 2.0)):
        assert accepted(ones, level, low, high).all()
    assert not accepted(ones, level, 1.0001, 2.0).any()
    assert not accepted(ones, level, 0.5, 0.9999).any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_where_the_sampler_agrees_the_weight_is_exactly_one(level):
    batch = of(RATIOS, MASK)
    batch.sampler_logprobs = batch.old_logprobs
    assert truncated_ratio(batch, level, 2.0).eq(1).all()


@pytest.mark.parametrize("junk", [0.0, -1e9, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
def test_what_lies_behind_the_mask_changes_nothing_and_is_never_accepted(level, junk):
    expected, batch = of(RATIOS, MASK), of(RATIOS, MASK, junk)
    object.__setattr__(batch, "sampler_logprobs", batch.sampler_logprobs.masked_fill(~batch.mask, junk))  # past Batch
    keep = accepted(batch, level, 0.0, 1e9)
    assert torch.equal(keep, batch.mask)
    if level != "mean":
        weight = truncated_ratio(batch, level, 5.0)
        assert weight.isfinite().all()
        assert torch.equal(weight, truncated_ratio(expected, level, 5.0))


@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
def test_a_row_without_a_token_has_weight_one_and_nothing_to_accept(level):
    batch = of([[3.0, 3.0]], [[0, 0]])
    assert not accepted(batch, level, 0.0, 1e9).any()
    if level != "mean":
        assert truncated_ratio(batch, level, 2.0).eq(1).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
def test_a_sampler_that_is_wildly_wrong_overflows_nothing(level, sign):
    """The log-ratio is held at ±20, after the sum: the cap and the bounds decide, not infinity."""
    batch = of([[1.0] * 3], [[1, 1, 1]])
    batch.old_logprobs = batch.sampler_logprobs + sign * 1e4
    assert not accepted(batch, level, 1e-6, 1e6).any()
    assert accepted(batch, level, 0.0, 1e9).all()  # exp(±20) itself, inside such bounds
    if level != "mean":
        expected = 2.0 if sign > 0 else math.exp(-20)
        assert truncated_ratio(batch, level, 2.0)[0].tolist() == pytest.approx([expected] * 3)
        assert truncated_ratio(batch, level, math.inf).isfinite().all()


def test_one_token_far_off_rejects_its_reply_but_not_its_geometric_mean():
    """Eleven tokens that agree and one off by a factor of 3: the product is 3, the mean 1.096."""
    batch = of([[1.0] * 11 + [3.0]], [[1] * 12])
    assert not accepted(batch, "sequence", 0.5, 2.0).any()
    assert accepted(batch, "mean", 0.5, 2.0).all()
    assert accepted(batch, "token", 0.5, 2.0)[0].tolist() == [True] * 11 + [False]


def test_neither_writes_to_the_batch():
    batch = of(RATIOS, MASK)
    before = batch.old_logprobs.clone(), batch.sampler_logprobs.clone()
    truncated_ratio(batch, "sequence", 2.0)
    accepted(batch, "mean", 0.5, 2.0)
    assert torch.equal(batch.old_logprobs, before[0])
    assert torch.equal(batch.sampler_logprobs, before[1])
