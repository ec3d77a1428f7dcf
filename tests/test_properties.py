"""Properties that hold for all numbers: hypothesis searches for a counterexample."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.advantages import ADVANTAGES
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES, k3
from rlkl.losses import LOSSES, token_weights
from rlkl.types import Batch, PolicyOutput

quick = settings(deadline=None, derandomize=True, max_examples=25)
F64 = torch.float64
G = 4
T = 5
score = st.integers(-1000, 1000).map(lambda x: x / 100)
group_scores = st.lists(score, min_size=2 * G, max_size=2 * G)  # of two groups, ties among them
nats = st.floats(-6, 6, allow_subnormal=False)
lengths = st.lists(st.integers(0, T), min_size=1, max_size=6).filter(any)
seeds = st.integers(0, 10_000)
CENTRED = ("dr_grpo", "rloo", "grpo", "opo", "reinforce_pp_baseline", "best_only")  # in the group


def mask_of(row_lengths: list[int]) -> torch.Tensor:
    return torch.arange(T) < torch.tensor(row_lengths)[:, None]


RESPONSES = mask_of([3, 1, 5, 2, 4, 4, 1, 2])


def advantages(
    name: str, scores: list[float], mask: torch.Tensor = RESPONSES, **options
) -> torch.Tensor:
    """(B, T), each score on the last token of its response."""
    last = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))
    rewards = torch.tensor(scores, dtype=F64)[:, None] * last
    return ADVANTAGES[name](rewards, None, mask, group_size=G, **options)[0]


# ------------------------------------------------------------------ advantages


@pytest.mark.parametrize("name", CENTRED)
@quick
@given(scores=group_scores, shifts=st.tuples(st.integers(-50, 50), st.integers(-50, 50)))
def test_a_constant_added_to_the_scores_of_a_group_changes_no_advantage(name, scores, shifts):
    shifted = [s + shifts[i // G] for i, s in enumerate(scores)]
    torch.testing.assert_close(
        advantages(name, shifted), advantages(name, scores), atol=1e-9, rtol=1e-9
    )


@quick
@given(scores=group_scores, factor=st.floats(0.01, 1000), by_batch=st.booleans())
def test_scaled_scores_give_the_same_grpo_advantages(scores, factor, by_batch):
    """But for the 1e-6 that is added to the std. Groups of zero variance stay exactly 0."""
    options = {"scale": "batch"} if by_batch else {}
    before = advantages("grpo", scores, **options)
    after = advantages("grpo", [factor * s for s in scores], **options)
    stds = torch.tensor(scores, dtype=F64).view(2, G).std(1)
    smallest = float(stds[stds > 1e-9].min()) if stds.gt(1e-9).any() else 1.0
    tolerance = 2e-6 / (smallest * min(factor, 1.0)) * before.abs() + 1e-9
    assert ((after - before).abs() <= tolerance).all()
    equal = torch.tensor(scores, dtype=F64).view(2, G)
    equal = (equal.amax(1) == equal.amin(1)).repeat_interleave(G)
    assert not after[equal].any()


@pytest.mark.parametrize("name", CENTRED)
@quick
@given(scores=group_scores, order=st.permutations(range(G)))
def test_responses_of_a_group_in_another_order_keep_their_advantages(name, scores, order):
    rows = [*order, *range(G, 2 * G)]
    after = advantages(name, [scores[i] for i in rows], RESPONSES[rows])
    torch.testing.assert_close(after, advantages(name, scores)[rows], atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------ KL


@quick
@given(xs=st.lists(nats, min_size=1, max_size=6))
def test_every_estimator_is_exactly_zero_where_the_policies_are_equal(xs):
    for name, estimator in KL.items():
        for dtype in (torch.float32, F64):
            x = torch.tensor([xs], dtype=dtype)
            assert estimator(x, x.clone()).eq(0).all(), name


@quick
@given(xs=st.lists(st.tuples(nats, nats), min_size=1, max_size=6))
def test_k3_is_never_negative(xs):
    """Not by a rounding error either, in float32."""
    for dtype in (torch.float32, F64):
        a, b = torch.tensor(xs, dtype=dtype).T
        assert k3(a, b).ge(0).all()
        assert k3(a, a + 1e-4 * b).ge(0).all()


@quick
@given(row_lengths=lengths, seed=seeds)
def test_every_kl_term_is_exactly_zero_where_the_policies_are_equal(row_lengths, seed):
    new, batch = output_and_batch(row_lengths, seed)
    zero = torch.zeros_like(new.logprobs)
    new = new._replace(kl_pi_ref=zero, kl_ref_pi=zero)
    batch.ref_logprobs = new.logprobs  # pi_old is elsewhere
    for name, term in KL_LOSSES.items():
        assert term(new, batch)[batch.mask].eq(0).all(), name
    batch.old_logprobs = new.logprobs
    for name, term in (KL_LOSSES | KL_OLD_LOSSES).items():
        assert term(new, batch)[batch.mask].eq(0).all(), name


# ------------------------------------------------------------------ policy losses


def output_and_batch(
    row_lengths: list[int], seed: int, junk: float = 0.0
) -> tuple[PolicyOutput, Batch]:
    """A filled float64 batch, and the output of a policy some way from pi_old.

    junk: what the output has outside the mask.
    """
    g, mask = torch.Generator().manual_seed(seed), mask_of(row_lengths)

    def normal() -> torch.Tensor:
        return torch.randn(mask.shape, generator=g, dtype=F64).masked_fill(~mask, junk)

    ids = torch.randint(3, 9, mask.shape, generator=g)
    batch = Batch(
        prompt_ids=ids[:, :2],
        prompt_mask=mask[:, :1].expand(-1, 2),
        response_ids=ids,
        mask=mask,
        sampler_logprobs=normal(),
        truncated=mask[:, -1],
        old_logprobs=normal(),
        old_entropy=normal().abs(),
        ref_logprobs=normal(),
        values=normal(),
        rewards=normal(),
        advantages=normal(),
        returns=normal(),
        selected=mask & (torch.rand(mask.shape, generator=g) > 0.5),
    )
    new = PolicyOutput(
        logprobs=batch.old_logprobs + 0.5 * normal(),
        entropy=normal().abs(),
        values=normal(),
        kl_pi_ref=normal().abs(),
        kl_ref_pi=normal().abs(),
    )
    batch.zero_padding()
    return new, batch


@quick
@given(
    row_lengths=lengths,
    seed=seeds,
    junk=st.sampled_from([1e30, -5.0, math.inf, -math.inf, math.nan]),
)
def test_junk_outside_the_mask_changes_no_policy_loss_and_no_kl_term(row_lengths, seed, junk):
    clean, dirty = output_and_batch(row_lengths, seed), output_and_batch(row_lengths, seed, junk)
    mask = clean[1].mask
    for name, loss in LOSSES.items():
        assert torch.equal(loss(*dirty)[0][mask], loss(*clean)[0][mask]), name
    for name, term in (*KL_LOSSES.items(), *KL_OLD_LOSSES.items()):
        assert torch.equal(term(*dirty)[mask], term(*clean)[mask]), name


@quick
@given(
    ratios=st.lists(st.tuples(st.floats(0.01, 20), score), min_size=1, max_size=8),
    epsilon=st.floats(0, 0.9),
    epsilon_high=st.floats(0, 5),
    delta=st.floats(6, 12),
)
def test_the_clipped_loss_is_pessimistic_and_delta_bounds_it(ratios, epsilon, epsilon_high, delta):
    """-min(w A, …) >= -w A. With delta it is lower for A < 0 alone, and at most delta·|A| there."""
    w, a = torch.tensor(ratios, dtype=F64)[:, None].unbind(2)
    mask = torch.ones(w.shape, dtype=torch.bool)
    zeros, ids = torch.zeros_like(w), mask.long()
    batch = Batch(ids, mask, ids, mask, zeros, ~mask[:, 0], old_logprobs=zeros, advantages=a)
    new = PolicyOutput(w.log(), zeros)
    options = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    clipped, _ = LOSSES["clip"](new, batch, **options)
    dual, _ = LOSSES["clip"](new, batch, **options, delta=delta)
    assert (clipped >= -w * a - 1e-9).all()
    assert (dual <= clipped + 1e-12).all()
    assert (dual[a < 0] <= delta * a[a < 0].abs() + 1e-9).all()
    assert torch.equal(dual[a >= 0], clipped[a >= 0])


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("how", ["token", "sequence"])
@quick
@given(row_lengths=lengths)
def test_the_weights_of_a_mean_sum_to_one(how, row_lengths):
    assert token_weights(mask_of(row_lengths), how, T).sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@quick
@given(row_lengths=lengths, sizes=st.lists(st.integers(1, 5), min_size=6, max_size=6), seed=seeds)
def test_any_cut_into_micro_batches_leaves_the_weighted_sum(how, row_lengths, sizes, seed):
    """Rows in any order, in pieces of any size, each trimmed; the totals are those of the batch."""
    new, batch = output_and_batch(row_lengths, seed)
    weights = token_weights(batch.mask, how, T)
    per_token, _ = LOSSES["clip"](new, batch)
    expected = (weights * per_token)[batch.mask].sum().item()
    totals = int(batch.mask.any(1).sum()), int(batch.mask.sum())

    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    loss = 0.0
    for rows in order.split_with_sizes(piece_sizes(len(batch), sizes)):
        micro = batch[rows].trim()
        columns = micro.mask.shape[1]
        output = PolicyOutput(*(None if x is None else x[rows, :columns] for x in new))
        per_token, _ = LOSSES["clip"](output, micro)
        weights = token_weights(micro.mask, how, T, totals)
        loss += (weights * per_token)[micro.mask].sum().item()
    assert loss == pytest.approx(expected, abs=1e-12)


def piece_sizes(rows: int, sizes: list[int]) -> list[int]:
    """The first sizes, cut so that they add up to `rows`."""
    pieces = []
    for size in sizes:
        pieces.append(min(size, rows - sum(pieces)))
    return [size for size in pieces if size]


# ------------------------------------------------------------------ batches


@quick
@given(row_lengths=lengths, seed=seeds, size=st.integers(1, 7), trim=st.booleans())
def test_a_batch_cut_into_pieces_is_joined_again(row_lengths, seed, size, trim):
    """Also where the pieces are trimmed: Batch.cat pads them to one width again."""
    _, batch = output_and_batch(row_lengths, seed)
    batch.response_ids = batch.response_ids * batch.mask
    batch.prompt_ids = batch.prompt_ids * batch.prompt_mask
    batch = batch.trim()
    pieces = [batch[i : i + size] for i in range(0, len(batch), size)]
    joined = Batch.cat([piece.trim() if trim else piece for piece in pieces])
    assert sum(map(len, pieces)) == len(joined) == len(batch)
    assert joined.temperature == batch.temperature
    for name, x in batch.tensors().items():
        assert torch.equal(joined.tensors()[name], x), name
