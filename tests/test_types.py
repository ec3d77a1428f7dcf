"""Batch: wrong shapes are refused by name, padding stays 0, and a row stays one row."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from rlkl.policy.microbatches import microbatches
from rlkl.types import Batch, nonzero_variance

P, T, D = 4, 6, 3
NAN, INF = float("nan"), float("inf")
PER_ROW = ["truncated", "scores", "last_values"]
TOKEN_FLOATS = [
    "sampler_logprobs",
    "old_logprobs",
    "old_entropy",
    "ref_logprobs",
    "values",
    "baseline",
    "rewards",
    "advantages",
    "returns",
    "weights",
]
TENSORS = [f.name for f in fields(Batch) if f.name != "temperature"]


def tensors(prompts: list[int], masks: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Every field of a batch, from the length of each prompt and the mask of each response.

    Floats outside the mask are garbage. Row b has the token ids 100 b + 1, 100 b + 2, …, so that
    it can be recognised wherever it goes.
    """
    g, rows = torch.Generator().manual_seed(seed), len(prompts)
    mask = torch.tensor(masks, dtype=torch.bool)
    columns = mask.shape[1]
    prompt_mask = torch.arange(P) >= P - torch.tensor(prompts)[:, None]
    first_id = 100 * torch.arange(rows)[:, None]
    garbage = torch.tensor([NAN, INF, -INF, 7.0]).repeat(rows * columns)
    garbage = garbage[: rows * columns].view(rows, columns)
    states = torch.randn(rows, columns, D, generator=g)
    batch = {
        "prompt_ids": (first_id + 1 + torch.arange(P)) * prompt_mask,
        "prompt_mask": prompt_mask,
        "response_ids": (first_id + 50 + torch.arange(columns)) * mask,
        "mask": mask,
        "truncated": torch.arange(rows) % 2 == 0,
        "scores": torch.randn(rows, generator=g),
        "last_values": torch.randn(rows, generator=g),
        "selected": (torch.rand(rows, columns, generator=g) > 0.5) & mask,
        "ref_states": torch.where(mask[..., None], states, garbage[..., None]),
    }
    for name in TOKEN_FLOATS:
        batch[name] = torch.where(mask, torch.randn(rows, columns, generator=g), garbage)
    return batch


# No row uses the first prompt column, none the last response column. The last row has a hole.
PROMPTS = [2, 3, 1, 3, 2]
MASKS = [
    [1, 1, 1, 0, 0, 0],
    [1, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 0],
    [1, 1, 0, 0, 0, 0],
    [1, 0, 1, 1, 0, 0],
]


@pytest.fixture
def parts() -> dict[str, Tensor]:
    return tensors(PROMPTS, MASKS)


@pytest.fixture
def batch(parts) -> Batch:
    batch = Batch(**parts, temperature=0.7)
    batch.zero_padding()
    return batch


def assert_same(a: Batch, b: Batch) -> None:
    assert a.temperature == b.temperature
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# ------------------------------------------------------------------ fields


def test_the_fields_here_are_those_of_a_batch(parts):
    assert sorted(parts) == sorted(TENSORS)


@pytest.mark.parametrize("name", [*PER_ROW, *TOKEN_FLOATS, "selected", "ref_states"])
def test_fill_refuses_a_wrong_shape_by_the_name_of_the_field(parts, batch, name):
    x, stored = parts[name], getattr(batch, name)
    wrong = [x[:-1]]
    if x.dim() > 1:
        wrong.append(torch.cat([x, x[:, :1]], 1))
        wrong.append(x[:, 0])
    if x.dim() == 2:
        wrong.append(x[..., None])
    for tensor in wrong:
        with pytest.raises(ValueError, match=rf"^Batch\.{name}: shape .* expected .* the mask is"):
            batch.fill(**{name: tensor})
    assert getattr(batch, name) is stored


def test_zero_padding_refuses_a_field_that_does_not_fit_the_mask(parts):
    """As of a sampler that is user code."""
    for name in ("sampler_logprobs", "old_logprobs", "ref_states"):
        batch = Batch(**parts | {name: parts[name][:, 1:]})
        with pytest.raises(ValueError, match=rf"^Batch\.{name}: shape"):
            batch.zero_padding()
    for wrong in (
        {"prompt_ids": parts["prompt_ids"][1:], "prompt_mask": parts["prompt_mask"][1:]},
        {"prompt_mask": parts["prompt_mask"][:, 1:]},
        {"response_ids": parts["response_ids"][:, 1:]},
        {"truncated": parts["truncated"][:, None]},
        {"mask": parts["mask"][:, 1:]},
    ):
        batch = Batch(**parts | wrong)
        with pytest.raises(ValueError, match=r"^Batch\.\w+: shape .* expected .* the mask is"):
            batch.zero_padding()


@pytest.mark.parametrize("name", [*TOKEN_FLOATS, "ref_states"])
def test_floats_are_zero_outside_the_mask(parts, batch, name):
    """After zero_padding as after fill, whatever was there; and unchanged inside the mask."""
    x, mask = getattr(batch, name), batch.mask
    assert torch.equal(x[mask], parts[name][mask])
    assert not x[~mask].any()
    inside = mask[..., None].expand(x.shape) if name == "ref_states" else mask
    for garbage in (NAN, INF, -INF, 3.0):
        batch.fill(**{name: torch.where(inside, 1.5, garbage)})
        assert torch.equal(getattr(batch, name), torch.where(inside, 1.5, 0.0)), garbage


def test_fill_keeps_scores_that_are_nan_and_fields_given_none(batch):
    scores = torch.tensor([NAN, 1.0, 2.0, NAN, 0.0])
    batch.fill(scores=scores, values=None)
    assert torch.equal(batch.scores.isnan(), scores.isnan())
    assert batch.values is not None


def test_an_assigned_tensor_is_stored_as_it_is(batch):
    x = torch.full(batch.mask.shape, NAN)
    batch.advantages = x
    assert batch.advantages is x


def test_gradients_flow_through_a_field_inside_the_mask_only(batch):
    leaf = torch.ones(batch.mask.shape, requires_grad=True)
    batch.fill(advantages=leaf)
    batch.advantages.sum().backward()
    assert torch.equal(leaf.grad, batch.mask.float())


def test_no_operation_writes_to_the_tensors_it_is_given(parts):
    before = {name: x.clone() for name, x in parts.items()}
    batch = Batch(**parts)
    batch.zero_padding()
    batch.fill(advantages=parts["advantages"])
    batch.trim()
    batch.without_rows(torch.tensor([True, False, True, False, False]))
    Batch.cat([batch, batch])
    for share_prompts in (False, True):
        list(microbatches(batch, 9, share_prompts))
    for name, x in before.items():
        assert torch.equal(x.nan_to_num(12345.0), parts[name].nan_to_num(12345.0)), name


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    "rows", [[4, 0, 2], torch.tensor([3, 1]), slice(1, 4), torch.arange(5) > 2]
)
def test_rows_are_taken_from_every_field(batch, rows):
    taken = batch[rows]
    for name in TENSORS:
        assert torch.equal(getattr(taken, name), getattr(batch, name)[rows]), name
    assert taken.temperature == 0.7


def test_rows_of_a_batch_that_is_not_filled_yet_keep_its_empty_fields(parts):
    sampled = {name: parts[name] for name in TENSORS[: TENSORS.index("scores")]}
    taken = Batch(**sampled)[[1, 0]]
    assert taken.old_logprobs is None
    assert taken.ref_states is None


def test_responses_are_the_ids_inside_the_mask(batch):
    expected = [[50, 51, 52], [150], [250, 251, 252, 253, 254], [350, 351], [450, 452, 453]]
    assert batch.responses() == expected


def test_without_rows_leaves_no_token_in_these_rows(batch):
    fewer = batch.without_rows(torch.tensor([False, True, False, True, False]))
    assert fewer.mask.sum(1).tolist() == [3, 0, 5, 0, 3]
    assert_same(fewer[[0, 2, 4]], batch[[0, 2, 4]])
    for name in (*TOKEN_FLOATS, "ref_states"):
        assert not getattr(fewer, name)[[1, 3]].any(), name
    assert batch.mask[1].any(), "the batch itself was changed"


def test_nonzero_variance_is_true_in_groups_whose_scores_differ():
    """NaN is no score: a group with one score beside it has no variance."""
    for scores, expected in (
        ([1.0, 1.0, 0.0, 0.1, 0.0, 0.0], [False, True, False]),
        ([NAN, 1.0, NAN, NAN, -2.0, 2.0], [False, False, True]),
    ):
        rows = nonzero_variance(torch.tensor(scores), group_size=2)
        assert rows.tolist() == [x for x in expected for _ in range(2)]
    three = nonzero_variance(torch.tensor([NAN, 1.0, 0.0, 3.0, NAN, 3.0]), group_size=3)
    assert three.tolist() == [True] * 3 + [False] * 3


def test_dropping_zero_variance_leaves_the_groups_whose_scores_differ_trimmed(batch):
    four = batch[:4]
    four.scores = torch.tensor([0.0, 1.0, 2.0, 2.0])
    assert_same(four.drop_zero_variance(group_size=2), four[:2].trim())
    four.scores = torch.tensor([1.0, 1.0, 2.0, 2.0])
    assert_same(four.drop_zero_variance(group_size=2), four.trim())


# ------------------------------------------------------------------ columns


def test_attended_reaches_the_last_sampled_token_through_holes(batch):
    assert batch.attended.sum(1).tolist() == [3, 1, 5, 2, 4]
    assert batch.attended[4].tolist() == [True] * 4 + [False] * 2


def test_trim_drops_the_columns_that_no_row_uses_and_nothing_else(batch):
    small = batch.trim()
    assert small.prompt_ids.shape == (5, 3)
    assert small.mask.shape == (5, 5)
    for name in TENSORS:
        expected = getattr(batch, name)
        if name.startswith("prompt"):
            expected = expected[:, 1:]
        elif expected.dim() > 1:
            expected = expected[:, :5]
        assert torch.equal(getattr(small, name), expected), name
    assert_same(small.trim(), small)


def test_trim_keeps_one_column_where_no_row_has_a_token():
    batch = Batch(**tensors([0, 0], [[0, 0, 0], [0, 0, 0]])).trim()
    assert batch.prompt_ids.shape == (2, 1)
    assert batch.mask.shape == (2, 1)


def test_cat_pads_prompts_on_the_left_and_responses_on_the_right(batch):
    narrow, wide = batch[[1]].trim(), batch[[2, 4]]
    joined = Batch.cat([narrow, wide], pad_id=9)
    assert joined.prompt_ids[0].tolist() == [9, 102, 103, 104]
    assert joined.response_ids[0].tolist() == [150, 9, 9, 9, 9, 9]
    assert joined.prompt_mask[0].tolist() == [False, True, True, True]
    assert joined.mask[0].tolist() == [True] + [False] * 5
    assert joined.ref_states.shape == (3, 6, D)
    for name in TENSORS:
        if not name.endswith("_ids"):  # only the ids have other padding than the rows had before
            assert torch.equal(getattr(joined, name), getattr(batch[[1, 2, 4]], name)), name
    assert_same(joined[1:], wide)


def test_cat_refuses_batches_sampled_at_different_temperatures(batch, parts):
    with pytest.raises(ValueError, match=r"temperatures differ: \[0\.7, 1\.0\]"):
        Batch.cat([batch, Batch(**parts, temperature=1.0)])
