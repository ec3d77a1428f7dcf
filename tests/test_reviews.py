"""The reviews task: its score is exact, and no pair of aspects is on both sides."""

import itertools

import pytest

from rlkl.tasks.reviews import ASPECTS, VALUES, Reviews
from rlkl.types import Example

ASKED = Example("plot and cast: ", "", {"aspects": ["plot", "cast"]})


@pytest.mark.parametrize(("reply", "score"), [
    ("fine plot, warm cast", 1), ("fine plot, odd cast", 0.5), ("fine plot, dull cast", 0),
    ("odd plot, cold cast", -0.5),
    ("dull plot, weak cast", -1), ("fine cast, warm plot", -1), ("fine plot, warm plot", -1), ("fine plot", -1),
    ("fine plot, nice cast", -1), ("fine plot, warm cast.", -1), ("fine plot, warm cast\n", -1), ("", -1),
    ("fine fine plot, warm cast", -1), ("fine  plot, warm cast", -1), ("x" * 100_000, -1)])
def test_the_score_is_the_mean_value_of_two_known_adjectives_on_the_aspects_in_order(reply, score):
    assert Reviews("train", size=1).score(ASKED, reply) == score


def test_answers_are_reviews_as_kind_as_unkind_and_no_pair_is_on_both_sides_in_either_order():
    train, heldout = (Reviews(side) for side in ("train", "heldout"))
    sides = [{frozenset(t[i].info["aspects"]) for i in range(len(t))} for t in (train, heldout)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {frozenset(p) for p in itertools.combinations(ASPECTS, 2)}
    scores = [train.score(train[i], train[i].answer) for i in range(len(train))]
    assert abs(sum(scores) / len(scores)) < 0.03
    assert all(train[i].answer.split()[1].strip(",") == train[i].info["aspects"][0] for i in range(50))
    assert sum(VALUES.values()) == 0


def test_the_same_split_is_the_same_every_time():
    first, again, other = (Reviews(side, size=50).examples for side in ("train", "train", "heldout"))
    assert first == again != other
