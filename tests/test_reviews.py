"""The reviews task: its score is exact, and no pair of aspects is on both sides."""

import itertools

import pytest

from rlkl.tasks.reviews import ASPECTS, VALUES, Reviews
from rlkl.types import Example

EXAMPLE = Example("plot and cast: ", "", {"aspects": ["plot", "cast"]})


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("fine plot, warm cast", 1),
        ("fine plot, odd cast", 0.5),
        ("fine plot, dull cast", 0),
        ("odd plot, cold cast", -0.5),
        ("dull plot, weak cast", -1),
        ("fine cast, warm plot", -1),
        ("fine plot, warm plot", -1),
        ("fine plot", -1),
        ("fine plot, nice cast", -1),
        ("fine plot, warm cast.", -1),
        ("fine plot, warm cast\n", -1),
        ("", -1),
        ("fine fine plot, warm cast", -1),
        ("fine  plot, warm cast", -1),
        ("x" * 100_000, -1),
    ],
)
def test_the_score_is_the_mean_value_of_two_known_adjectives_on_the_aspects_in_order(
    response, score
):
    task = Reviews("train", size=1)
    assert task.score(EXAMPLE, response) == score
    assert task.grade(EXAMPLE, response) == {"gold": score}


def test_answers_are_reviews_as_often_kind_as_unkind():
    task = Reviews("train")
    scores = [task.score(e, e.answer) for e in task.examples]
    assert abs(sum(scores) / len(scores)) < 0.03
    assert sum(VALUES.values()) == 0
    for example in task.examples[:50]:
        assert example.answer.split()[1].strip(",") == example.info["aspects"][0]


def test_no_pair_of_aspects_is_on_both_sides_in_either_order():
    train, heldout = (
        {frozenset(e.info["aspects"]) for e in Reviews(side).examples}
        for side in ("train", "heldout")
    )
    assert not train & heldout
    assert train | heldout == {frozenset(pair) for pair in itertools.combinations(ASPECTS, 2)}


def test_a_side_is_the_same_every_time():
    first = Reviews("train", size=50).examples
    assert first == Reviews("train", size=50).examples
    assert first != Reviews("heldout", size=50).examples
