"""Selectors: by rank, so many tokens and no more, never outside the mask."""

import itertools

import pytest
import torch

from rlkl.losses.selectors import SELECTORS, clip_cov, covariance, kl_cov, top_entropy
from rlkl.types import Batch

F64 = torch.float64


def of(mask: list[list[int]], **fields: list[list[float]]) -> Batch:
    """A batch with this mask and these per-token numbers."""
    inside = torch.tensor(mask, dtype=torch.bool)
    batch = Batch(
        inside.long(), inside, inside.long(), inside, torch.zeros(inside.shape), inside[:, 0]
    )
    batch.fill(**{name: torch.tensor(x, dtype=F64) for name, x in fields.items()})
    return batch


def random(rows: int = 10, columns: int = 10, seed: int = 0) -> tuple[Batch, torch.Tensor]:
    """A ragged batch, with a hole, that has all a selector reads; and uniforms."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=g)
    mask[0] = torch.arange(columns) != 1
    batch = Batch(mask.long(), mask, mask.long(), mask, torch.zeros(mask.shape), mask[:, 0])
    entropy, _ = torch.randn(2, rows, columns, generator=g, dtype=F64).abs()
    logprobs, advantages = 2 * torch.randn(2, rows, columns, generator=g, dtype=F64)
    batch.fill(old_entropy=entropy, old_logprobs=logprobs, advantages=advantages)
    return batch, torch.rand(rows, columns, generator=g, dtype=F64)


def places(selected: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(x) for x in selected.nonzero().tolist()]


def test_as_many_as_the_fraction_rounded_down_and_at_least_one():
    """Of eight tokens; columns outside the mask do not count."""
    numbers = [[3.0, 1.0, 7.0, 99.0, 99.0], [5.0, 8.0, 2.0, 6.0, 4.0]]
    batch = of([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], old_entropy=numbers)
    ranked = [(1, 1), (0, 2), (1, 3), (1, 0), (1, 4), (0, 0), (1, 2), (0, 1)]
    counts = {0.0: 1, 2e-4: 1, 0.124: 1, 0.25: 2, 0.3: 2, 0.5: 4, 1.0: 8}
    for fraction, count in counts.items():
        selected = top_entropy(batch, torch.zeros(2, 5), fraction=fraction)
        assert selected.dtype == torch.bool
        assert places(selected) == sorted(ranked[:count]), fraction


@pytest.mark.parametrize("name", SELECTORS)
def test_exactly_that_many_and_never_outside_the_mask(name):
    for seed, fraction in itertools.product(range(3), (0.0, 0.1, 0.37, 1.0)):
        batch, uniforms = random(seed=seed)
        candidates = batch.mask
        if name == "clip_cov":
            cov = covariance(batch)
            candidates = batch.mask & (cov > 1) & (cov < 5)
        selected = SELECTORS[name](batch, uniforms, fraction=fraction)
        count = max(int(fraction * int(batch.mask.sum())), 1)
        assert selected.sum() == min(count, int(candidates.sum())), (seed, fraction)
        assert not (selected & ~candidates).any()


def test_negative_numbers_lose_to_what_is_chosen_and_not_to_the_zeros_behind_the_mask():
    batch = of([[1, 1, 0], [1, 0, 0]], old_entropy=[[-3.0, -1.0, 0.0], [-2.0, 0.0, 0.0]])
    assert places(top_entropy(batch, torch.zeros(2, 3), fraction=0.7)) == [(0, 1), (1, 0)]


def test_of_equals_the_first_are_chosen_so_that_ties_cannot_add_up():
    """A threshold at the quantile would select all six."""
    batch = of([[1, 1, 1], [1, 1, 1]], old_entropy=[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    assert places(top_entropy(batch, torch.zeros(2, 3), fraction=0.5)) == [(0, 0), (0, 1), (0, 2)]
    batch.old_logprobs = batch.advantages = torch.zeros(2, 3)
    assert places(kl_cov(batch, torch.zeros(2, 3), fraction=0.5)) == [(0, 0), (0, 1), (0, 2)]


def test_covariance_is_the_product_of_deviations_from_the_means_over_all_tokens():
    """log pi -1, -2, -3 and A 4, 0, -1: the means are -2 and 1, so 3, 0, 2. Padding has none."""
    batch = of(
        [[1, 1, 0], [1, 0, 0]],
        old_logprobs=[[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0]],
        advantages=[[4.0, 0.0, 9.0], [-1.0, 9.0, 9.0]],
    )
    assert covariance(batch).tolist() == [[3.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    assert places(kl_cov(batch, torch.zeros(2, 3), fraction=0.5)) == [(0, 0)]
    assert places(kl_cov(batch, torch.zeros(2, 3), fraction=0.67)) == [(0, 0), (1, 0)]


def test_kl_cov_takes_the_largest_covariances_and_not_the_largest_in_size():
    """A very negative one, a likely token with A < 0, makes the entropy rise: it stays free."""
    batch = of(
        [[1, 1, 1, 1]], old_logprobs=[[-1.0, -1.0, -3.0, -3.0]], advantages=[[-9.0, 1.0, 5.0, 3.0]]
    )
    cov = covariance(batch)[0].tolist()
    assert cov == [-9.0, 1.0, -5.0, -3.0]
    assert places(kl_cov(batch, torch.zeros(1, 4), fraction=0.25)) == [(0, 1)]
    assert places(kl_cov(batch, torch.zeros(1, 4), fraction=0.5)) == [(0, 1), (0, 3)]


COVARIANCES = [5.0, 3.0, 2.0, 0.5, 1.0, 1.5, -1.0, 2.0]
INSIDE = [(0, 1), (0, 2), (0, 5), (0, 7)]  # of (1, 5): the ends are not


def window() -> Batch:
    """Eight tokens of these covariances: log pi is its mean ± 1, and A has mean 0."""
    signs = [1.0, -1.0] * 4
    advantages = [c * x for c, x in zip(COVARIANCES, signs, strict=True)]
    batch = of([[1] * 8], old_logprobs=[[x - 2 for x in signs]], advantages=[advantages])
    assert covariance(batch)[0].tolist() == COVARIANCES
    return batch


def test_clip_cov_draws_from_the_open_window_alone():
    for seed in range(20):
        uniforms = torch.rand(1, 8, generator=torch.Generator().manual_seed(seed))
        (place,) = places(clip_cov(window(), uniforms))
        assert place in INSIDE
        assert places(clip_cov(window(), uniforms, fraction=1.0)) == INSIDE
        assert places(clip_cov(window(), uniforms, fraction=1.0, low=1.9, high=5.1)) == [
            (0, x) for x in (0, 1, 2, 7)
        ]


def test_clip_cov_takes_the_largest_uniforms_and_counts_by_all_tokens():
    """A fraction of 3/8 of eight tokens is three, of the four candidates."""
    uniforms = torch.tensor([[0.9, 0.1, 0.7, 0.9, 0.9, 0.3, 0.9, 0.5]])
    assert places(clip_cov(window(), uniforms, fraction=0.375)) == [(0, 2), (0, 5), (0, 7)]
    assert places(clip_cov(window(), 1 - uniforms, fraction=0.25)) == [(0, 1), (0, 5)]


def test_other_uniforms_draw_other_tokens_and_the_same_ones_the_same():
    """Each candidate is drawn about as often as any other: over 300 draws of 1 of n."""
    batch, _ = random(rows=20)
    cov = covariance(batch)
    candidates = int((batch.mask & (cov > 1) & (cov < 5)).sum())
    assert candidates >= 5
    drawn: dict[tuple[int, ...], int] = {}
    for seed in range(300):
        uniforms = torch.rand(
            batch.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=F64
        )
        (place,) = places(clip_cov(batch, uniforms))
        assert places(clip_cov(batch, uniforms)) == [place]
        drawn[place] = drawn.get(place, 0) + 1
    assert len(drawn) == candidates
    assert max(drawn.values()) < 3 * 300 / candidates


@pytest.mark.parametrize("name", ["top_entropy", "kl_cov"])
def test_the_other_two_draw_nothing(name):
    batch, uniforms = random()
    select = SELECTORS[name]
    assert torch.equal(
        select(batch, uniforms, fraction=0.3), select(batch, 1 - uniforms, fraction=0.3)
    )


def test_without_a_candidate_nothing_is_chosen():
    """No token in the window; no token at all, as when truncation = mask left none."""
    batch, uniforms = random()
    assert not clip_cov(batch, uniforms, low=1e6, high=1e7).any()
    none = batch[:]
    none.mask = torch.zeros_like(batch.mask)
    for select in SELECTORS.values():
        selected = select(none, uniforms)
        assert selected.shape == batch.mask.shape
        assert not selected.any()


def test_the_table_is_complete():
    assert {f.__name__: f for f in SELECTORS.values()} == SELECTORS
