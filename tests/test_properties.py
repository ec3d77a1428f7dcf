"""What must hold for any numbers: hypothesis looks for those for which it does not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.advantages import ADVANTAGES
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES, k3
from rlkl.losses import LOSSES, clipped_surrogate, importance_ratio, token_weights
from rlkl.types import Batch, Evaluation

quick = settings(deadline=None, derandomize=True, max_examples=25)
F64 = torch.float64
G = 4
score = st.integers(-1000, 1000).map(lambda x: x / 100)
groups = st.lists(score, min_size=2 * G, max_size=2 * G)  # the scores of two groups, ties among them
nats = st.floats(-6, 6, allow_subnormal=False)
lengths = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)
seeds = st.integers(0, 10_000)
RELATIVE = ("dr_grpo", "rloo", "grpo", "opo", "reinforce_pp_baseline", "best_only")  # to the group: no level of its own


def columns(row_lengths: list[int], width: int = 5) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(row_lengths)[:, None]


REPLIES = columns([3, 1, 5, 2, 4, 4, 1, 2])


def advantages(name: str, scores: list[float], mask: torch.Tensor = REPLIES, **options) -> torch.Tensor:
    """(B, T), each score on the last token of its reply."""
    last = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))
    rewards = torch.tensor(scores, dtype=F64)[:, None] * last
    return ADVANTAGES[name](rewards, None, mask, group_size=G, **options)[0]


# Advantages
@pytest.mark.parametrize("name", RELATIVE)
@quick
@given(scores=groups, shifts=st.tuples(st.integers(-50, 50), st.integers(-50, 50)))
def test_a_constant_added_to_the_scores_of_a_group_changes_no_advantage(name, scores, shifts):
    moved = [s + shifts[i // G] for i, s in enumerate(scores)]
    torch.testing.assert_close(advantages(name, moved), advantages(name, scores), atol=1e-9, rtol=1e-9)


@quick
@given(scores=groups, c=st.floats(0.01, 1000), by_batch=st.booleans())
def test_rewards_in_another_unit_are_the_same_to_grpo(scores, c, by_batch):
    """But for the 1e-6 beside the std; what is unanimous, and so 0, stays so."""
    options = {"scale": "batch"} if by_batch else {}
    before = advantages("grpo", scores, **options)
    after = advantages("grpo", [c * s for s in scores], **options)
    stds = torch.tensor(scores, dtype=F64).view(2, G).std(1)
    smallest = float(stds[stds > 1e-9].min()) if stds.gt(1e-9).any() else 1.0
    assert ((after - before).abs() <= 2e-6 / (smallest * min(c, 1.0)) * before.abs() + 1e-9).all()


@pytest.mark.parametrize("name", RELATIVE)
@quick
@given(scores=groups, order=st.permutations(range(G)))
def test_replies_of_a_group_in_another_order_keep_their_advantages(name, scores, order):
    rows = [*order, *range(G, 2 * G)]
    after = advantages(name, [scores[i] for i in rows], REPLIES[rows])
    torch.testing.assert_close(after, advantages(name, scores)[rows], atol=1e-9, rtol=1e-9)


# KL
@pytest.mark.parametrize("name", KL)
@quick
@given(xs=st.lists(nats, min_size=1, max_size=6))
def test_every_estimator_is_exactly_zero_where_the_policies_are_equal(name, xs):
    for dtype in (torch.float32, F64):
        x = torch.tensor([xs], dtype=dtype)
        assert KL[name](x, x.clone()).eq(0).all()


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
    new, batch = step(row_lengths, seed)
    zero = torch.zeros_like(new.logprobs)
    new = new._replace(kl_pi_ref=zero, kl_ref_pi=zero)
    batch.ref_logprobs = new.logprobs  # pi_old is elsewhere
    for name, term in KL_LOSSES.items():
        assert term(new, batch)[batch.mask].eq(0).all(), name
    batch.old_logprobs = new.logprobs
    for name, term in (KL_LOSSES | KL_OLD_LOSSES).items():
        assert term(new, batch)[batch.mask].eq(0).all(), name


# Losses
def step(row_lengths: list[int], seed: int, junk: float = 0.0) -> tuple[Evaluation, Batch]:
    """A filled float64 batch, and what a policy some way off thinks of it; `junk` wherever no token is."""
    g, mask = torch.Generator().manual_seed(seed), columns(row_lengths)

    def normal() -> torch.Tensor:
        return torch.randn(len(mask), 5, generator=g, dtype=F64).masked_fill(~mask, junk)

    ids = torch.randint(3, 9, mask.shape, generator=g)
    old = normal()
    batch = Batch(ids[:, :2], mask[:, :1].expand(-1, 2), ids, mask, normal(), mask[:, -1], old_logprobs=old)
    batch.ref_logprobs, batch.values, batch.returns, batch.rewards = normal(), normal(), normal(), normal()
    batch.advantages, batch.old_entropy = normal(), normal().abs()
    batch.selected = mask & (torch.rand(mask.shape, generator=g) > 0.5)
    return Evaluation(old + 0.5 * normal(), normal().abs(), normal(), None, normal().abs(), normal().abs()), batch


@quick
@given(row_lengths=lengths, seed=seeds, junk=st.sampled_from([1e30, -5.0, math.inf, -math.inf, math.nan]))
def test_garbage_behind_the_mask_changes_no_loss_and_no_term(row_lengths, seed, junk):
    clean, dirty = step(row_lengths, seed), step(row_lengths, seed, junk)
    mask = clean[1].mask
    for name, loss in LOSSES.items():
        assert torch.equal(loss(*dirty)[0][mask], loss(*clean)[0][mask]), name
    for name, term in (*KL_LOSSES.items(), *KL_OLD_LOSSES.items()):
        assert torch.equal(term(*dirty)[mask], term(*clean)[mask]), name


@quick
@given(ratios=st.lists(st.tuples(st.floats(0.01, 20), score), min_size=1, max_size=8), low=st.floats(0, 0.9),
       high=st.floats(0, 5), cap=st.floats(6, 12))
def test_the_clipped_loss_bounds_the_surrogate_from_above_but_for_what_the_cap_forgives(ratios, low, high, cap):
    """-min(w A, …) >= -w A: pessimistic. Dual clip lies between that and cap·|A|, and only ever below PPO's."""
    w, a = torch.tensor(ratios, dtype=F64).T
    x, zero = w.log(), torch.zeros_like(w)
    plain = -importance_ratio(x, zero) * a
    clipped = clipped_surrogate(x, zero, a, low, high)[0]
    dual = clipped_surrogate(x, zero, a, low, high, cap)[0]
    assert (clipped >= plain - 1e-12).all()
    assert (dual <= clipped + 1e-12).all()
    assert (dual[a < 0] <= cap * a[a < 0].abs() + 1e-9).all()
    assert torch.equal(dual[a >= 0], clipped[a >= 0])


# Weights
@pytest.mark.parametrize("how", ["token", "sequence"])
@quick
@given(row_lengths=lengths)
def test_the_weights_of_a_mean_sum_to_one(how, row_lengths):
    assert token_weights(columns(row_lengths), how, 5).sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@quick
@given(row_lengths=lengths, cuts=st.lists(st.integers(1, 5), min_size=6, max_size=6), seed=seeds)
def test_any_split_into_micro_batches_leaves_the_weighted_sum(how, row_lengths, cuts, seed):
    """Weights fixed by the whole step, then rows in any order, in pieces of any size, each trimmed."""
    new, batch = step(row_lengths, seed)
    batch.weights = token_weights(batch.mask, how, 5)
    per_token = LOSSES["ppo"](new, batch)[0]
    whole = (batch.weights * per_token)[batch.mask].sum().item()
    order, total = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed)).tolist(), 0.0
    while order:
        size = cuts.pop()
        rows, order = order[:size], order[size:]
        micro = batch[rows].trim()
        of_rows = Evaluation(*(x if x is None else x[rows, : micro.mask.shape[1]] for x in new))
        total += (micro.weights * LOSSES["ppo"](of_rows, micro)[0])[micro.mask].sum().item()
    assert total == pytest.approx(whole, abs=1e-12)


# Batch
@quick
@given(row_lengths=lengths, seed=seeds, size=st.integers(1, 7), trim=st.booleans())
def test_a_batch_that_was_split_is_put_together_again(row_lengths, seed, size, trim):
    """Batch.cat pads what trim() cut off, but for columns that no row uses; ids behind the mask become padding."""
    _, batch = step(row_lengths, seed)
    batch.response_ids, batch.prompt_ids = batch.response_ids * batch.mask, batch.prompt_ids * batch.prompt_mask
    batch = batch.trim()
    pieces = [piece.trim() if trim else piece for piece in batch.split(size)]
    joined = Batch.cat(pieces)
    assert sum(map(len, pieces)) == len(joined) == len(batch)
    assert joined.temperature == batch.temperature
    for name, x in vars(batch).items():
        if torch.is_tensor(x):
            assert torch.equal(getattr(joined, name), x), name
