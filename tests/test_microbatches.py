"""Micro-batches: every row once, within the budget, and hardly any token read twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_types import MASKS, PROMPTS, P, T, assert_same, tensors

from rlkl.policy.microbatches import MOST_KEYS, MOST_PADDED, microbatches, pack_by_tokens
from rlkl.policy.shared_prompts import share_prompts
from rlkl.types import Batch


def batch_of(prompts: list[int], masks: list[list[int]]) -> Batch:
    batch = Batch(**tensors(prompts, masks))
    batch.zero_padding()
    return batch


def rows_strategy():
    mask = st.lists(st.booleans(), min_size=T, max_size=T).filter(any)
    return st.lists(st.tuples(st.integers(1, P), mask), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(rows=rows_strategy(), budget=st.integers(1, 60), groups=st.integers(1, 4))
def test_they_hold_each_row_once_trimmed_and_within_the_budget(rows, budget, groups):
    batch = batch_of([prompt for prompt, _ in rows], [mask for _, mask in rows])
    for i in range(len(batch)):  # rows i, i + groups, … have the same prompt
        batch.prompt_ids[i] = batch.prompt_ids[i % groups]
        batch.prompt_mask[i] = batch.prompt_mask[i % groups]
    for shared in (False, True):
        seen = []
        for indices, micro in microbatches(batch, budget, shared):
            seen += indices
            assert_same(micro, batch[indices].trim())
            longest = (micro.prompt_mask.sum(1) + micro.attended.sum(1)).max()
            tokens = (
                share_prompts(micro, flash=False).ids.numel() if shared else len(micro) * longest
            )
            assert tokens <= budget or len(micro) == 1
            assert micro.mask.numel() <= MOST_PADDED * budget or len(micro) == 1
            assert micro.mask.sum() == batch.mask[indices].sum()
        assert sorted(seen) == list(range(len(batch)))


def sizes(batch: Batch, budget: int, shared: bool = False) -> list[int]:
    return [len(micro) for _, micro in microbatches(batch, budget, shared)]


def test_rows_count_an_empty_response_as_one_token():
    """As trim does. Two rows with a prompt of 1 and no response take 2·(1 + 1) tokens."""
    batch = batch_of([1, 1], [[0, 0, 0], [0, 0, 0]])
    assert sizes(batch, 2) == [1, 1]


def test_rows_fill_their_budget():
    """They have 6, 6, 5, 5 and 4 tokens, and are as long as the longest one beside them."""
    batch = batch_of(PROMPTS, MASKS)
    assert sizes(batch, 12) == [2, 2, 1]
    assert sizes(batch, 10**6) == [5]
    assert sizes(batch, 1) == [1] * 5


@pytest.mark.parametrize("shared", [False, True])
def test_they_start_with_the_longest_responses(shared):
    """So a run whose first micro-batch fits in memory fits to the end."""
    batch = batch_of([2] * 5, MASKS)
    longest = [int(micro.attended.sum(1).max()) for _, micro in microbatches(batch, 12, shared)]
    assert longest == sorted(longest, reverse=True)
    assert len(longest) > 1


def test_packing_is_longest_first_and_counts_padded_tokens():
    assert list(pack_by_tokens([3, 9, 2, 30, 8], 20)) == [[3], [1, 4], [0, 2]]
    assert list(pack_by_tokens([], 20)) == []


def gsm8k_like(prompts: int, group: int, seed: int) -> Batch:
    """Prompts of about 50 to 250 tokens and responses of 50 to 500, in groups."""
    g = torch.Generator().manual_seed(seed)
    prompt = (100 * torch.exp(0.35 * torch.randn(prompts, generator=g))).long().clamp(30, 400)
    response = 180 * torch.exp(0.45 * torch.randn(prompts * group, generator=g))
    response = response.long().clamp(10, 512)
    prompt_mask = torch.arange(400) >= 400 - prompt[:, None].repeat_interleave(group, 0)
    mask = torch.arange(512) < response[:, None]
    first_id = torch.arange(prompts).repeat_interleave(group)[:, None]
    return Batch(
        prompt_ids=first_id * prompt_mask,
        prompt_mask=prompt_mask,
        response_ids=mask.long(),
        mask=mask,
        sampler_logprobs=torch.zeros(mask.shape),
        truncated=mask[:, -1],
    )


@pytest.mark.parametrize("max_tokens", [8192, 16_384, 32_768])
def test_hardly_a_position_is_computed_that_is_not_a_prompt_once_or_a_response(max_tokens):
    """At most 10 % more: 256 responses to 32 prompts. Row by row it was 38 to 57 % more."""
    batch = gsm8k_like(32, 8, seed=0)
    read = sum(
        share_prompts(micro, flash=False).ids.numel()
        for _, micro in microbatches(batch, max_tokens, share_prompts=True)
    )
    once = int(batch.prompt_mask[::8].sum() + batch.mask.sum())
    assert once <= read <= 1.10 * once


def test_a_group_is_split_only_where_it_exceeds_a_micro_batch():
    batch = gsm8k_like(16, 8, seed=1)
    groups_of = [{i // 8 for i in rows} for rows, _ in microbatches(batch, 8192, True)]
    assert sum(len(groups) for groups in groups_of) == 16
    assert len(list(microbatches(batch, 700, True))) > 16


def test_one_long_response_is_not_beside_many_short_ones():
    """The states of its micro-batch are padded to its length."""
    mask = torch.zeros(401, 512, dtype=torch.bool)
    mask[0] = True
    mask[1:, :2] = True
    ids = torch.ones(401, 1, dtype=torch.long)
    batch = Batch(ids, ids.bool(), mask.long(), mask, mask.float(), mask[:, -1])
    assert max(micro.mask.numel() for _, micro in microbatches(batch, 1400, True)) <= 4 * 1400


def test_many_short_responses_to_a_long_prompt_are_split():
    """Each layer keeps a copy of the prompt's keys for each of them."""
    prompt = torch.ones(64, 400, dtype=torch.long)
    mask = torch.ones(64, 4, dtype=torch.bool)
    batch = Batch(prompt, prompt.bool(), mask.long(), mask, mask.float(), ~mask[:, 0])
    rows = [len(micro) for _, micro in microbatches(batch, 1000, True)]
    assert sum(rows) == 64
    assert max(rows) * 404 <= MOST_KEYS * 1000
