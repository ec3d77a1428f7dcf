"""Is a one-line review positive or negative? One word is the answer.

The held-out reviews share neither a sentence nor an adjective with those that are trained on, so
their accuracy counts what the model understands, and not what it has memorised.
"""

from __future__ import annotations

from rlkl.tasks.listed import Listed
from rlkl.types import Example

INSTRUCTION = "{review} Is the sentiment positive or negative? Answer with one word."

SENTENCES = {
    "train": (
        "The film was {}.",
        "I found the hotel {}.",
        "Their food is {}.",
        "This book is {} from the first page to the last.",
        "The service here is always {}.",
        "My new phone turned out to be {}.",
        "What we heard at the concert was {}.",
        "The room looked {} when we arrived.",
        "Everybody told me the lesson was {}.",
        "We had a day at the beach that was {}.",
        "The actors were {} tonight.",
        "After a week, this car still seems {} to me.",
    ),
    "heldout": (
        "Honestly, the museum is {}.",
        "The coffee tasted {}.",
        "Our guide was {} and we will tell our friends.",
        "How {} this game is!",
        "The second season of the show gets {}.",
        "I would call the garden {}.",
    ),
}
ADJECTIVES = {
    "train": {
        "positive": (
            *("good", "great", "wonderful", "excellent", "delightful", "superb", "charming"),
            *("lovely", "brilliant", "amazing", "fantastic", "enjoyable", "perfect", "beautiful"),
            *("pleasant", "impressive", "terrific", "marvelous", "outstanding", "nice"),
            *("elegant", "refreshing", "fun", "magnificent", "stunning", "fabulous"),
        ),
        "negative": (
            *("bad", "terrible", "awful", "boring", "dreadful", "horrible", "dull"),
            *("ugly", "disappointing", "poor", "disgusting", "annoying", "useless", "mediocre"),
            *("unpleasant", "lousy", "pathetic", "miserable", "inferior", "tedious"),
            *("clumsy", "shabby", "painful", "hideous", "worthless", "frustrating"),
        ),
    },
    "heldout": {
        "positive": (
            *("splendid", "awesome", "exquisite", "gorgeous", "incredible", "superior"),
            *("remarkable", "exciting", "adorable", "satisfying", "graceful", "flawless"),
        ),
        "negative": (
            *("appalling", "atrocious", "horrid", "nasty", "unbearable", "dismal"),
            *("irritating", "depressing", "gloomy", "revolting", "inadequate", "tiresome"),
        ),
    },
}


class Sentiment(Listed):
    """Every sentence of a side with every adjective of that side."""

    def __init__(self, split: str) -> None:
        self.examples = [
            Example(chat(INSTRUCTION.format(review=review)), label)
            for review, label in reviews(split)
        ]

    def score(self, example: Example, response: str) -> float:
        """1 for the right word alone; case, white space and a full stop do not matter."""
        return float(response.strip().removesuffix(".").lower() == example.answer)


def reviews(split: str) -> list[tuple[str, str]]:
    """The reviews of a side, each with its label."""
    return [
        (sentence.format(adjective), label)
        for sentence in SENTENCES[split]
        for label, adjectives in ADJECTIVES[split].items()
        for adjective in adjectives
    ]


def chat(text: str) -> list[dict]:
    """Chat messages with this text; the empty one replaces the template's own system prompt."""
    return [{"role": "system", "content": ""}, {"role": "user", "content": text}]
