"""Rewards: the score is paid on the last token, and a broken reward is one line for the user."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rlkl.advantages import token_rewards
from rlkl.errors import UserError
from rlkl.rewards import compute_scores, from_task, overlong
from rlkl.types import Batch, Example

EXAMPLES = [Example("1+1=", "2"), Example("2+2=", "4"), Example("3+3=", "6")]
RESPONSES = ["2", "5", "six\nor so"]
NAN = float("nan")


def make_batch() -> Batch:
    ids = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.ones(3, 4, dtype=torch.bool)
    return Batch(ids, mask, ids, mask, torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))


def scores_of(reward, batch: Batch | None = None):
    return compute_scores(reward, EXAMPLES, RESPONSES, batch or make_batch())


# ------------------------------------------------------------------ token_rewards


def test_the_score_is_on_the_last_sampled_token():
    """The EOS if there is one. Holes in the mask do not matter; a row without a token gets none."""
    mask = torch.tensor(
        [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]],
        dtype=torch.bool,
    )
    rewards = token_rewards(torch.tensor([1.5, -2.0, 3.0, 4.0, -5.0, 6.0]), mask)
    assert rewards.tolist() == [
        [0, 0, 0, 1.5],
        [0, -2, 0, 0],
        [3, 0, 0, 0],
        [0, 0, 4, 0],
        [0, 0, 0, -5],
        [0, 0, 0, 0],
    ]


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_rewards_of_a_row_sum_to_its_score_which_is_on_its_last_token(rows):
    mask = torch.tensor(rows, dtype=torch.bool)
    scores = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    rewards = token_rewards(scores, mask)
    assert rewards.dtype == scores.dtype
    assert torch.equal(rewards.sum(1), scores * mask.any(1))
    for row, row_mask in zip(rewards, mask, strict=True):
        if row_mask.any():
            (paid,) = row.nonzero()
            assert row_mask[paid]
            assert not row_mask[paid + 1 :].any()


def test_the_score_of_a_row_without_a_token_is_not_read():
    mask = torch.tensor([[True, False], [False, False]])
    assert token_rewards(torch.tensor([1.0, NAN]), mask).tolist() == [[1, 0], [0, 0]]


def test_a_score_of_zero_or_less_is_placed_like_any_other():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert token_rewards(torch.tensor([0.0, -1.0]), mask).tolist() == [[0, 0, 0], [0, 0, -1]]


# ------------------------------------------------------------------ overlong


def mask_of_lengths(lengths: list[int], columns: int = 10) -> torch.Tensor:
    return torch.arange(columns) < torch.tensor(lengths)[:, None]


def test_the_overlong_punishment_at_its_corners():
    """DAPO's eq. 13, max 10 and buffer 4: 0 up to 6 tokens, a quarter more for each, -1 at 10."""
    punishment = overlong(mask_of_lengths([0, 1, 5, 6, 7, 8, 9, 10]), 10, 4)
    assert punishment.tolist() == [0.0, 0.0, 0.0, 0.0, -0.25, -0.5, -0.75, -1.0]
    assert punishment.shape == (8,)
    assert overlong(mask_of_lengths([9, 10]), 10, 1).tolist() == [0.0, -1.0]
    assert overlong(mask_of_lengths([0, 5, 10]), 10, 10).tolist() == [0.0, -0.5, -1.0]


def test_the_overlong_punishment_counts_tokens_and_not_columns():
    """Padding and holes are no tokens. The width of the batch does not matter."""
    mask = mask_of_lengths([8, 9])
    mask[0, 2] = False
    assert overlong(mask, 10, 4).tolist() == [-0.25, -0.75]
    assert torch.equal(overlong(F.pad(mask, (0, 5)), 10, 4), overlong(mask, 10, 4))
    assert torch.equal(overlong(mask[:, :9], 10, 4), overlong(mask, 10, 4))
    assert overlong(mask, 100, 4).tolist() == [0.0, 0.0]


# ------------------------------------------------------------------ compute_scores


def test_scores_and_parts_pass_through():
    parts = {"right": torch.tensor([1.0, 0.0, 0.0])}
    scores, returned = scores_of(lambda e, r, b: (torch.tensor([1.0, 0.0, 0.5]), parts))
    assert scores.tolist() == [1.0, 0.0, 0.5]
    assert returned is parts


def test_a_reward_may_return_a_list_of_numbers():
    scores, _ = scores_of(lambda e, r, b: ([1, 0, 2], {}))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 0.0, 2.0]


def test_a_reward_gets_the_examples_the_responses_and_the_batch():
    batch = make_batch()

    def by_answer(examples, responses, given_batch):
        assert given_batch is batch
        return [float(e.answer == r) for e, r in zip(examples, responses, strict=True)], {}

    assert scores_of(by_answer, batch)[0].tolist() == [1.0, 0.0, 0.0]


def raises(examples, responses, batch):
    raise RuntimeError("no such column\nand a second line")


def nan_for_the_third(examples, responses, batch):
    return torch.tensor([1.0, 0.0, NAN]), {}


def infinite(examples, responses, batch):
    return torch.tensor([1.0, float("inf"), 0.0]), {}


def one_too_few(examples, responses, batch):
    return torch.zeros(2), {}


def per_token(examples, responses, batch):
    return torch.zeros(3, 4), {}


def a_number(examples, responses, batch):
    return 1.0, {}


def no_parts(examples, responses, batch):
    return torch.zeros(3)


def nothing(examples, responses, batch):
    return None


def words(examples, responses, batch):
    return ["good", "bad", "bad"], {}


class Judge:
    """A reward that holds something, such as a model. An object has no __name__."""

    def __call__(self, examples, responses, batch):
        return torch.full((3,), NAN), {}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, "raises raised RuntimeError: no such column$"),
        (partial(raises), "the reward raises raised"),
        (nan_for_the_third, r"third gave nan for the response 'six\\nor so' to '3\+3='"),
        (infinite, r"infinite gave inf for the response '5' to '2\+2='"),
        (one_too_few, r"one_too_few gave scores of shape \(2,\) for 3 responses"),
        (per_token, r"per_token gave scores of shape \(3, 4\) for 3 responses"),
        (a_number, r"a_number gave scores of shape \(\) for 3 responses"),
        (no_parts, "no_parts raised"),
        (nothing, "nothing raised TypeError"),
        (words, "words raised"),
        (Judge(), "Judge gave nan"),
    ],
)
def test_a_broken_reward_is_one_line_that_names_it(reward, message):
    with pytest.raises(UserError, match=message) as caught:
        scores_of(reward)
    assert len(str(caught.value).splitlines()) == 1


# ------------------------------------------------------------------ from_task


def test_a_task_that_scores_with_a_number():
    scores, parts = scores_of(from_task(lambda e, r: 0.5 + (e.answer == r)))
    assert scores.tolist() == [1.5, 0.5, 0.5]
    assert parts == {}


def test_a_task_that_scores_with_named_parts():
    """Their sum is the score, and each is reported."""

    def score(example, response):
        return {"right": 1.0 * (response == example.answer), "short": 0.25 * (len(response) == 1)}

    scores, parts = scores_of(from_task(score))
    assert scores.tolist() == [1.25, 0.25, 0.0]
    assert {name: x.tolist() for name, x in parts.items()} == {
        "right": [1.0, 0.0, 0.0],
        "short": [0.25, 0.25, 0.0],
    }


@pytest.mark.parametrize("row", [0, 1])
def test_a_part_that_only_one_response_has_counts_as_zero_in_the_others(row):
    """Whether the first response has it, or only a later one."""

    def score(example, response):
        return {"right": 1.0, "bonus": 2.0} if response == RESPONSES[row] else {"right": 0.5}

    scores, parts = scores_of(from_task(score))
    assert scores.tolist() == [3.0 if i == row else 0.5 for i in range(3)]
    assert parts["bonus"].tolist() == [2.0 if i == row else 0.0 for i in range(3)]


def test_an_error_names_the_function_of_the_task():
    def my_score(example, response):
        raise ZeroDivisionError("by zero")

    with pytest.raises(UserError, match="the reward my_score raised ZeroDivisionError: by zero"):
        scores_of(from_task(my_score))
