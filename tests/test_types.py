"""Batch: shapes are refused by name, nothing lives behind the mask, rows keep together whatever is done to them."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.types import Batch

P, T, D = 4, 6, 3
TOKEN_FLOATS = ["sampler_logprobs", "old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"]
TOKEN_FLOATS += ["weights", "old_entropy"]
TENSORS = [f.name for f in fields(Batch) if f.name != "temperature"]


def tensors(prompts: list[int], replies: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every field of a batch: prompts of these lengths, replies with these masks, garbage wherever there is no token.

    Row b's token ids are 100 b + 1, 100 b + 2, …, so that a row can be recognised after any re-arrangement.
    """
    g, rows = torch.Generator().manual_seed(seed), len(prompts)
    mask = torch.tensor(replies, dtype=torch.bool)
    width = mask.shape[1]
    prompt_mask = torch.arange(P) >= P - torch.tensor(prompts)[:, None]
    base = 100 * torch.arange(rows)[:, None]
    made = {
        "prompt_ids": (base + 1 + torch.arange(P)) * prompt_mask,
        "prompt_mask": prompt_mask,
        "response_ids": (base + 50 + torch.arange(width)) * mask,
        "mask": mask,
        "truncated": torch.arange(rows) % 2 == 0,
        "selected": (torch.rand(rows, width, generator=g) > 0.5) & mask,
        "ref_states": torch.randn(rows, width, D, generator=g),
    }
    garbage = torch.tensor([float("nan"), float("inf"), -float("inf"), 7.0]).repeat(rows * width)[: rows * width]
    garbage = garbage.view(rows, width)
    made |= {n: torch.where(mask, torch.randn(rows, width, generator=g), garbage) for n in TOKEN_FLOATS}
    made["ref_states"] = torch.where(mask[..., None], made["ref_states"], garbage[..., None])
    return made


RAGGED = [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0]]
PROMPTS = [2, 3, 1, 3, 2]  # no row uses the first prompt column, none the last reply column; the last row has a hole


@pytest.fixture
def parts():
    return tensors(PROMPTS, RAGGED)


@pytest.fixture
def batch(parts):
    return Batch(**parts, temperature=0.7)


def same(a: Batch, b: Batch) -> None:
    assert a.temperature == b.temperature
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def wrong_shapes(name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """One row fewer; one column more."""
    wrong = [x[:-1]]
    if x.dim() > 1:
        wrong.append(torch.cat([x, x[:, :1]], 1))
    return wrong


@pytest.mark.parametrize("name", [n for n in TENSORS if n not in ("mask", "prompt_ids")])
def test_a_wrong_shape_is_refused_by_the_name_of_its_field(parts, batch, name):
    for wrong in wrong_shapes(name, parts[name]):
        with pytest.raises(ValueError, match=rf"^Batch\.{name}: shape"):
            Batch(**{**parts, name: wrong})
        with pytest.raises(ValueError, match=rf"^Batch\.{name}: shape"):
            setattr(batch, name, wrong)


def test_prompt_ids_with_another_number_of_rows_are_refused(parts):
    with pytest.raises(ValueError, match=r"^Batch\.prompt_ids: shape"):
        Batch(**{**parts, "prompt_ids": parts["prompt_ids"][:-1]})


def test_prompt_ids_of_another_width_are_refused_with_the_name_of_the_pair(parts):
    with pytest.raises(ValueError, match=r"^Batch\.prompt_mask: shape"):
        Batch(**{**parts, "prompt_ids": parts["prompt_ids"][:, 1:]})


def test_a_mask_of_another_shape_is_refused(parts):
    for wrong in wrong_shapes("mask", parts["mask"]):
        with pytest.raises(ValueError, match=r"^Batch\.\w+: shape .* expected .* the mask is"):
            Batch(**{**parts, "mask": wrong})


def test_a_per_row_tensor_where_a_per_token_one_belongs_is_refused(batch):
    with pytest.raises(ValueError, match=r"Batch\.advantages"):
        batch.advantages = torch.ones(len(batch))
    with pytest.raises(ValueError, match=r"Batch\.advantages"):
        batch.advantages = torch.ones(len(batch), 1)


@pytest.mark.parametrize("name", [*TOKEN_FLOATS, "ref_states"])
def test_floats_are_zero_behind_the_mask_on_construction(parts, batch, name):
    x = getattr(batch, name)
    assert torch.equal(x[batch.mask], parts[name][batch.mask])
    assert torch.equal(x[~batch.mask], torch.zeros_like(x[~batch.mask]))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 3.0])
@pytest.mark.parametrize("name", [*TOKEN_FLOATS, "ref_states"])
def test_floats_are_zero_behind_the_mask_on_assignment(batch, name, garbage):
    shape = (*batch.mask.shape, D) if name == "ref_states" else batch.mask.shape
    inside = batch.mask[..., None].expand(shape) if name == "ref_states" else batch.mask
    given = torch.where(inside, 1.5, garbage)
    setattr(batch, name, given)
    assert torch.equal(getattr(batch, name), torch.where(inside, 1.5, 0.0))


def test_nothing_is_written_to_the_callers_tensors(parts):
    before = {n: x.clone() for n, x in parts.items()}
    batch = Batch(**parts)
    batch.advantages = parts["advantages"]
    batch.trim(), batch.shuffle(torch.Generator().manual_seed(0)), Batch.cat([batch, batch])
    list(batch.microbatches(9))
    for name, x in before.items():
        assert torch.equal(x.nan_to_num(12345.0), parts[name].nan_to_num(12345.0)), name


def test_gradients_flow_through_a_field_inside_the_mask_only(batch):
    leaf = torch.ones(batch.mask.shape, requires_grad=True)
    batch.advantages = leaf
    batch.advantages.sum().backward()
    assert torch.equal(leaf.grad, batch.mask.float())


@pytest.mark.parametrize("rows", [[4, 0, 2], torch.tensor([3, 1]), slice(1, 4), torch.arange(5) > 2])
def test_rows_are_taken_from_every_field(batch, rows):
    taken = batch[rows]
    for name in TENSORS:
        assert torch.equal(getattr(taken, name), getattr(batch, name)[rows]), name
    assert taken.temperature == 0.7


def test_rows_of_a_batch_that_is_not_filled_yet_keep_its_empty_fields(parts):
    early = {n: parts[n] for n in TENSORS[: TENSORS.index("old_logprobs")]}
    taken = Batch(**early)[[1, 0]]
    assert taken.old_logprobs is None
    assert taken.ref_states is None


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (7, [5])])
def test_split_cuts_consecutive_rows(batch, size, lengths):
    pieces = list(batch.split(size))
    assert [len(p) for p in pieces] == lengths
    same(Batch.cat(pieces), batch)


def test_shuffle_permutes_whole_rows_and_repeats_with_its_generator(batch):
    shuffled = batch.shuffle(torch.Generator().manual_seed(3))
    order = (shuffled.prompt_ids[:, -1] // 100).tolist()
    assert sorted(order) == list(range(5))
    assert order != list(range(5))
    same(shuffled, batch[order])
    same(shuffled, batch.shuffle(torch.Generator().manual_seed(3)))


def test_attended_reaches_the_last_sampled_token_through_holes(batch):
    assert batch.attended.sum(1).tolist() == [3, 1, 5, 2, 4]
    assert batch.attended[4].tolist() == [True] * 4 + [False] * 2


def test_trim_drops_the_columns_no_row_uses_and_nothing_else(batch):
    small = batch.trim()
    assert small.prompt_ids.shape == (5, 3)
    assert small.mask.shape == (5, 5)
    for name in TENSORS:
        x, y = getattr(batch, name), getattr(small, name)
        if name.startswith("prompt"):
            x = x[:, 1:]
        elif x.dim() > 1:
            x = x[:, :5]
        assert torch.equal(x, y), name
    same(small.trim(), small)


def test_trim_keeps_one_column_where_no_row_has_a_token():
    batch = Batch(**tensors([0, 0], [[0, 0, 0], [0, 0, 0]])).trim()
    assert batch.prompt_ids.shape == (2, 1)
    assert batch.mask.shape == (2, 1)


def test_cat_pads_prompts_on_the_left_and_replies_on_the_right(batch):
    narrow, wide = batch[[1]].trim(), batch[[2, 4]]
    joined = Batch.cat([narrow, wide], pad_id=9)
    assert joined.prompt_ids[0].tolist() == [9, 102, 103, 104]
    assert joined.response_ids[0].tolist() == [150, 9, 9, 9, 9, 9]
    assert joined.prompt_mask[0].tolist() == [False, True, True, True]
    assert joined.mask[0].tolist() == [True] + [False] * 5
    assert joined.ref_states.shape == (3, 6, D)
    for name in TENSORS:
        if not name.endswith("_ids"):  # padding ids aside, the three rows are those of the batch they came from
            assert torch.equal(getattr(joined, name), getattr(batch[[1, 2, 4]], name)), name
    same(joined[1:], wide)


def test_cat_refuses_batches_sampled_at_different_temperatures(batch, parts):
    with pytest.raises(ValueError, match=r"temperatures differ: \[0\.7, 1\.0\]"):
        Batch.cat([batch, Batch(**parts, temperature=1.0)])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, P), st.lists(st.booleans(), min_size=T, max_size=T).filter(any)),
        min_size=1,
        max_size=9,
    ),
    budget=st.integers(1, 60),
)
def test_microbatches_cover_each_row_once_trimmed_and_within_the_budget(rows, budget):
    batch = Batch(**tensors([p for p, _ in rows], [r for _, r in rows]))
    seen = []
    for index, micro in batch.microbatches(budget):
        seen += index
        same(micro, batch[index].trim())
        positions = len(micro) * (micro.prompt_ids.shape[1] + micro.mask.shape[1])
        assert positions <= budget or len(micro) == 1
        assert torch.equal(micro.attended, batch[index].attended[:, : micro.mask.shape[1]])
        assert micro.mask.sum() == batch.mask[index].sum()
    assert sorted(seen) == list(range(len(batch)))


# an empty reply is counted as no column, but
# trim keeps one.
def test_microbatches_of_empty_replies_keep_within_the_budget():
    """As when truncated replies are masked out: two rows of a prompt of 1 and no reply are 2·(1 + 1) positions."""
    batch = Batch(**tensors([1, 1], [[0, 0, 0], [0, 0, 0]]))
    assert [len(micro) for _, micro in batch.microbatches(2)] == [1, 1]


def test_microbatches_fill_their_budget(batch):
    """Rows need 6, 5, 5, 5 and 4 positions of their own; padded side by side they fit two and two in 14."""
    sizes = [len(micro) for _, micro in batch.microbatches(14)]
    assert sizes == [2, 2, 1]
    assert [len(micro) for _, micro in batch.microbatches(10**6)] == [5]
    assert [len(micro) for _, micro in batch.microbatches(1)] == [1] * 5


def test_microbatches_count_the_padding_between_unlike_rows():
    """Prompt 3 + reply 1 and prompt 1 + reply 3 are 4 positions each, but 2·(3 + 3) side by side."""
    batch = Batch(**tensors([3, 1], [[1, 0, 0], [1, 1, 1]]))
    assert [len(micro) for _, micro in batch.microbatches(11)] == [1, 1]
    assert [len(micro) for _, micro in batch.microbatches(12)] == [2]


def test_microbatches_start_with_the_longest_row(batch):
    """So that a run that fits in memory at its first micro-batch fits to the end."""
    longest = [max((b.prompt_mask.sum(1) + b.attended.sum(1)).tolist()) for _, b in batch.microbatches(14)]
    assert longest == sorted(longest, reverse=True)
