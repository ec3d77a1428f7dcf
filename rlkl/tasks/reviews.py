"""Short reviews: a prompt names two sides of a film, a reply gives each an adjective. Kindness is scored exactly.

The synthetic preference of the tiny RLHF configs, in the manner of the sentiment task of Ziegler et al. 2019.
"""

from __future__ import annotations

import itertools
import re
import zlib
from random import Random

from rlkl.tasks.listed import Listed
from rlkl.types import Example

ASPECTS = ("plot", "cast", "music", "pace", "ending", "humor", "action", "camera", "sound", "lights", "sets", "script")
VALUES = {
    **dict.fromkeys(("fine", "lovely", "bright", "witty", "superb", "warm"), 1),
    **dict.fromkeys(("odd", "long", "loud", "quiet"), 0),
    **dict.fromkeys(("dull", "weak", "clumsy", "bland", "awful", "cold"), -1),
}
REPLY = re.compile(r"([a-z]{1,9}) ([a-z]{1,9}), ([a-z]{1,9}) ([a-z]{1,9})")


class Reviews(Listed):
    """`size` reviews of pairs of aspects, adjectives drawn at random; 1 pair in 10 is held out, in either order.

    plot and cast: wants something like "dull plot, witty cast".
    """

    def __init__(self, split: str, *, size: int = 4096) -> None:
        pairs = [p for p in itertools.permutations(ASPECTS, 2) if held_out(*p) == (split == "heldout")]
        rng = Random(split)
        self.examples = [review(*pairs[i % len(pairs)], rng) for i in range(size)]

    def score(self, example: Example, reply: str) -> float:
        """The mean value of the two adjectives, from -1 to 1; -1 for what is not a review of these aspects."""
        found = REPLY.fullmatch(reply)
        if not found or [found[2], found[4]] != example.info["aspects"]:
            return -1.0
        values = [VALUES.get(found[i]) for i in (1, 3)]
        return -1.0 if None in values else sum(values) / 2

    def grade(self, example: Example, reply: str) -> dict[str, float]:
        """What is meant, beside the reward model that is paid."""
        return {"gold": self.score(example, reply)}


def review(first: str, second: str, rng: Random) -> Example:
    one, other = rng.choices(list(VALUES), k=2)
    return Example(f"{first} and {second}: ", f"{one} {first}, {other} {second}", {"aspects": [first, second]})


def held_out(first: str, second: str) -> bool:
    """One pair in ten, by a hash that does not see the order."""
    return zlib.crc32(" ".join(sorted((first, second))).encode()) % 10 == 0
