"""Short film reviews: the synthetic preference of the tiny RLHF configs.

A prompt names two aspects of a film, and a response gives each an adjective. The score is how kind
the adjectives are, so the true preference is known exactly. The task follows the sentiment task of
Ziegler et al. 2019, arXiv:1909.08593.
"""

from __future__ import annotations

import itertools
import re
from random import Random

from rlkl.tasks.listed import Listed
from rlkl.tasks.split import is_heldout_tenth
from rlkl.types import Example

ASPECTS = (
    *("plot", "cast", "music", "pace", "ending", "humor"),
    *("action", "camera", "sound", "lights", "sets", "script"),
)
VALUES = {
    **dict.fromkeys(("fine", "lovely", "bright", "witty", "superb", "warm"), 1),
    **dict.fromkeys(("odd", "long", "loud", "quiet"), 0),
    **dict.fromkeys(("dull", "weak", "clumsy", "bland", "awful", "cold"), -1),
}
REVIEW = re.compile(r"([a-z]{1,9}) ([a-z]{1,9}), ([a-z]{1,9}) ([a-z]{1,9})")


class Reviews(Listed):
    """`size` reviews of pairs of aspects, with adjectives drawn at random.

    A response to `plot and cast: ` is, for example, `dull plot, witty cast`. 1 pair in 10 is held
    out, in either order.
    """

    def __init__(self, split: str, *, size: int = 4096) -> None:
        pairs = itertools.permutations(ASPECTS, 2)
        side = [p for p in pairs if is_heldout(*p) == (split == "heldout")]
        rng = Random(split)
        self.examples = [review(*side[i % len(side)], rng) for i in range(size)]

    def score(self, example: Example, response: str) -> float:
        """The mean value of the two adjectives, from -1 to 1.

        -1 for a response that is not a review of these aspects, in this order.
        """
        match = REVIEW.fullmatch(response)
        if not match or [match[2], match[4]] != example.info["aspects"]:
            return -1.0
        first, second = VALUES.get(match[1]), VALUES.get(match[3])
        return -1.0 if first is None or second is None else (first + second) / 2

    def grade(self, example: Example, response: str) -> dict[str, float]:
        """{"gold": the true preference}, to be compared with the reward model that is optimised."""
        return {"gold": self.score(example, response)}


def review(first: str, second: str, rng: Random) -> Example:
    """A prompt about two aspects, and a random review as its answer."""
    one, other = rng.choices(list(VALUES), k=2)
    answer = f"{one} {first}, {other} {second}"
    return Example(f"{first} and {second}: ", answer, {"aspects": [first, second]})


def is_heldout(first: str, second: str) -> bool:
    """The same for either order of the two aspects."""
    return is_heldout_tenth(" ".join(sorted((first, second))))
