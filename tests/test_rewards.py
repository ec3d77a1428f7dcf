"""Judging: a score lands on the last sampled token, and a broken reward is one line for the user."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.errors import UserError
from rlkl.rewards import from_task, judge, overlong, token_rewards
from rlkl.types import Batch, Example

EXAMPLES = [Example("1+1=", "2"), Example("2+2=", "4"), Example("3+3=", "6")]
REPLIES = ["2", "5", "six\nor so"]


@pytest.fixture
def batch():
    ids, mask = torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool)
    return Batch(ids, mask, ids, mask, torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))


# Token rewards
def test_the_score_is_on_the_last_sampled_token():
    """The EOS if there is one, else the last that fitted; through holes; nowhere in a row without a token."""
    mask = torch.tensor(
        [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool
    )
    got = token_rewards(torch.tensor([1.5, -2.0, 3.0, 4.0, -5.0, 6.0]), mask)
    assert got.tolist() == [[0, 0, 0, 1.5], [0, -2, 0, 0], [3, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, -5], [0, 0, 0, 0]]


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_rewards_of_a_row_sum_to_its_score_on_one_token_with_none_behind_it(rows):
    mask = torch.tensor(rows, dtype=torch.bool)
    scores = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    got = token_rewards(scores, mask)
    assert got.dtype == scores.dtype
    assert torch.equal(got.sum(1), scores * mask.any(1))
    for row, m in zip(got, mask, strict=True):
        if m.any():
            (at,) = row.nonzero()
            assert m[at]
            assert not m[at + 1 :].any()


def test_the_score_of_a_row_without_a_token_is_not_seen():
    mask = torch.tensor([[True, False], [False, False]])
    assert token_rewards(torch.tensor([1.0, float("nan")]), mask).tolist() == [[1, 0], [0, 0]]


def test_a_score_of_zero_or_less_is_placed_like_any_other():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert token_rewards(torch.tensor([0.0, -1.0]), mask).tolist() == [[0, 0, 0], [0, 0, -1]]


# Overlong
def of_lengths(lengths: list[int], columns: int = 10) -> torch.Tensor:
    return torch.arange(columns) < torch.tensor(lengths)[:, None]


def test_the_overlong_punishment_at_its_corners():
    """DAPO's eq. 13, max 10 and buffer 4: 0 up to 6 tokens, then a quarter more for each, -1 at 10."""
    got = overlong(of_lengths([0, 1, 5, 6, 7, 8, 9, 10]), 10, 4)
    assert got.tolist() == [0.0, 0.0, 0.0, 0.0, -0.25, -0.5, -0.75, -1.0]
    assert got.shape == (8,)
    assert overlong(of_lengths([9, 10]), 10, 1).tolist() == [0.0, -1.0]
    assert overlong(of_lengths([0, 5, 10]), 10, 10).tolist() == [0.0, -0.5, -1.0]


def test_the_overlong_punishment_goes_by_tokens_and_not_by_columns():
    """Padding and holes are no tokens; the room is sampling.max_new_tokens, however wide the batch happens to be."""
    mask = of_lengths([8, 9])
    mask[0, 2] = False
    assert overlong(mask, 10, 4).tolist() == [-0.25, -0.75]
    wide = torch.nn.functional.pad(mask, (0, 5))
    assert torch.equal(overlong(wide, 10, 4), overlong(mask, 10, 4))
    assert torch.equal(overlong(mask[:, :9], 10, 4), overlong(mask, 10, 4))
    assert overlong(mask, 100, 4).tolist() == [0.0, 0.0]


# judge
def test_scores_and_parts_pass_through(batch):
    parts = {"right": torch.tensor([1.0, 0.0, 0.0])}
    scores, got = judge(lambda e, r, b: (torch.tensor([1.0, 0.0, 0.5]), parts), EXAMPLES, REPLIES, batch)
    assert scores.tolist() == [1.0, 0.0, 0.5]
    assert got is parts


def test_a_list_of_numbers_is_good_enough(batch):
    scores, _ = judge(lambda e, r, b: ([1, 0, 2], {}), EXAMPLES, REPLIES, batch)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 0.0, 2.0]


def test_a_reward_sees_the_rows_it_judges(batch):
    def by_prompt(examples, replies, given_batch):
        assert given_batch is batch
        return torch.tensor([float(e.answer == r) for e, r in zip(examples, replies, strict=True)]), {}

    assert judge(by_prompt, EXAMPLES, REPLIES, batch)[0].tolist() == [1.0, 0.0, 0.0]


def raises(examples, replies, batch):
    raise RuntimeError("no such column\nand a second line")


def nan_for_the_third(examples, replies, batch):
    return torch.tensor([1.0, 0.0, float("nan")]), {}


def infinite(examples, replies, batch):
    return torch.tensor([1.0, float("inf"), 0.0]), {}


def one_too_few(examples, replies, batch):
    return torch.zeros(2), {}


def per_token(examples, replies, batch):
    return torch.zeros(3, 4), {}


def a_number(examples, replies, batch):
    return 1.0, {}


def no_parts(examples, replies, batch):
    return torch.zeros(3)


def nothing(examples, replies, batch):
    return None


def words(examples, replies, batch):
    return ["good", "bad", "bad"], {}


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (raises, "raises raised RuntimeError: no such column$"),
        (nan_for_the_third, r"nan_for_the_third gave nan for the reply 'six\\nor so' to '3\+3='"),
        (infinite, r"infinite gave inf for the reply '5' to '2\+2='"),
        (one_too_few, r"one_too_few gave scores of shape \(2,\) for 3 replies"),
        (per_token, r"per_token gave scores of shape \(3, 4\) for 3 replies"),
        (a_number, r"a_number gave scores of shape \(\) for 3 replies"),
        (no_parts, "no_parts raised"),
        (nothing, "nothing raised TypeError"),
        (words, "words raised"),
    ],
)
def test_a_broken_reward_is_one_line_that_names_it(reward, says, batch):
    with pytest.raises(UserError, match=says) as caught:
        judge(reward, EXAMPLES, REPLIES, batch)
    assert len(str(caught.value).splitlines()) == 1


def test_a_bound_reward_is_named_by_its_function(batch):
    from functools import partial

    with pytest.raises(UserError, match="the reward raises raised"):
        judge(partial(raises), EXAMPLES, REPLIES, batch)


class Judge:
    """A reward that holds something, such as a model."""

    def __call__(self, examples, replies, batch):
        return torch.full((3,), float("nan")), {}


# an object has no __name__.
def test_a_callable_object_is_named_by_its_class(batch):
    with pytest.raises(UserError, match="Judge gave nan"):
        judge(Judge(), EXAMPLES, REPLIES, batch)


# from_task
def test_a_task_that_scores_with_a_number(batch):
    scores, parts = from_task(lambda e, r: 0.5 + (e.answer == r))(EXAMPLES, REPLIES, batch)
    assert scores.tolist() == [1.5, 0.5, 0.5]
    assert parts == {}


def test_a_task_that_scores_with_named_parts(batch):
    """Their sum is the score, and each is reported."""

    def score(example, reply):
        return {"right": 1.0 * (reply == example.answer), "short": 0.25 * (len(reply) == 1)}

    scores, parts = judge(from_task(score), EXAMPLES, REPLIES, batch)
    assert scores.tolist() == [1.25, 0.25, 0.0]
    assert {n: x.tolist() for n, x in parts.items()} == {"right": [1.0, 0.0, 0.0], "short": [0.25, 0.25, 0.0]}


def test_a_part_that_a_reply_does_not_have_counts_as_zero(batch):
    def score(example, reply):
        return {"right": 1.0, "bonus": 2.0} if reply == "2" else {"right": 0.5}

    scores, parts = from_task(score)(EXAMPLES, REPLIES, batch)
    assert scores.tolist() == [3.0, 0.5, 0.5]
    assert parts["bonus"].tolist() == [2.0, 0.0, 0.0]


# only the first reply's part names are summed.
def test_a_part_that_only_a_later_reply_has_counts_too(batch):
    def score(example, reply):
        return {"right": 1.0, "bonus": 2.0} if reply == "5" else {"right": 0.5}

    scores, parts = from_task(score)(EXAMPLES, REPLIES, batch)
    assert scores.tolist() == [0.5, 3.0, 0.5]
    assert parts["bonus"].tolist() == [0.0, 2.0, 0.0]


def test_a_task_keeps_its_name_in_an_error(batch):
    def my_score(example, reply):
        raise ZeroDivisionError("by zero")

    with pytest.raises(UserError, match="the reward my_score raised ZeroDivisionError: by zero"):
        judge(from_task(my_score), EXAMPLES, REPLIES, batch)
