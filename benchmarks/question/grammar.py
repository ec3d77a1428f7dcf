"""A language of 31 words with an exact grammar: "the happy cat sees a red house ."

    sentence = det [adjective] noun verb det [adjective] noun "."

Kind adjectives are rare in it, and they are what the gold score counts.
"""

from __future__ import annotations

import re
from random import Random

from rlkl.tasks.listed import Listed
from rlkl.types import Example

PROMPT = "say:"
DETERMINERS = ("the", "a")
KIND = ("happy", "lovely", "bright", "great")
PLAIN = ("red", "old", "big", "small", "wet", "dry", "cold", "round")
NOUNS = ("cat", "dog", "man", "tree", "house", "car", "bird", "boat")
VERBS = ("sees", "likes", "finds", "moves", "wants", "holds", "pulls", "hears")
CLASSES = {"d": DETERMINERS, "k": KIND, "p": PLAIN, "n": NOUNS, "v": VERBS, ".": (".",)}
LETTER = {word: letter for letter, words in CLASSES.items() for word in words}
SENTENCE = re.compile(r"d[kp]?nvd[kp]?n\.")  # of a text with one letter for each word


class Grammar(Listed):
    """The task: `size` texts of one or two sentences.

    Half of the nouns have an adjective, of which 3 in 20 are kind. The score, which is the gold
    score, is the number of kind words inside complete sentences, minus 2 · the share of words that
    are in none. An empty response scores -2.
    """

    def __init__(self, split: str, *, size: int = 8192) -> None:
        rng = Random(split)
        self.examples = [Example(PROMPT, " ".join(text(rng))) for _ in range(size)]

    def score(self, example: Example, response: str) -> dict[str, float]:
        kind, valid = parse(response.split())
        return {"kind": kind, "invalid": 2 * (valid - 1)}

    def grade(self, example: Example, response: str) -> dict[str, float]:
        words = response.split()
        kind, valid = parse(words)
        return {"gold": kind + 2 * (valid - 1), "valid": valid, "distinct": distinct(words)}


def parse(words: list[str]) -> tuple[int, float]:
    """The number of kind words inside complete sentences, and the share of words that are in one.

    (0, 0) if there are no words.
    """
    sentences = SENTENCE.findall("".join(LETTER.get(word, "?") for word in words))
    kind = sum(sentence.count("k") for sentence in sentences)
    inside = sum(len(sentence) for sentence in sentences)
    return kind, inside / max(len(words), 1)


def distinct(words: list[str], n: int = 2) -> float:
    """The share of n-grams that are distinct; 1 where there are none."""
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def text(rng: Random) -> list[str]:
    """One or two random sentences."""
    return [word for _ in range(rng.choice((1, 2))) for word in sentence(rng)]


def sentence(rng: Random) -> list[str]:
    return [*noun_phrase(rng), rng.choice(VERBS), *noun_phrase(rng), "."]


def noun_phrase(rng: Random) -> list[str]:
    adjective = [rng.choice(KIND if rng.random() < 0.15 else PLAIN)] if rng.random() < 0.5 else []
    return [rng.choice(DETERMINERS), *adjective, rng.choice(NOUNS)]
