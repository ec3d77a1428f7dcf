"""A reward model with a blind spot: learned from preferences, it sees which words there are, and not their order."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlkl.preferences import Pair, bradley_terry
from rlkl.types import Batch, Example


def bag_of_words(examples: Sequence[Example], replies: Sequence[str], batch: Batch, *,
                 weights: str = "runs/question/reward.json") -> tuple[Tensor, dict[str, Tensor]]:
    """Σ over words of a learned weight, less its mean and over its standard deviation on replies of the reference."""
    model = read(weights)
    scores = counts(replies, list(model["words"])) @ torch.tensor(list(model["words"].values()))
    return ((scores - model["mean"]) / model["std"]).to(batch.mask.device), {}


@functools.cache
def read(path: str) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def counts(replies: Sequence[str], words: Sequence[str]) -> Tensor:
    """(B,) texts → (B, W) how often each word occurs; a word that the model never met counts nowhere."""
    bags = [Counter(reply.split()) for reply in replies]
    return torch.tensor([[float(bag[word]) for word in words] for bag in bags])


def fit(pairs: Sequence[Pair], l2: float = 1e-3, steps: int = 300) -> dict[str, float]:
    """{word: weight} by Bradley-Terry on bags of words: a logistic regression by the loss of `rlkl reward-model`."""
    texts = [reply for pair in pairs for reply in (pair.chosen, pair.rejected)]
    words = sorted({word for text in texts for word in text.split()})
    rows, weights = counts(texts, words), torch.zeros(len(words), requires_grad=True)
    adam = torch.optim.Adam([weights], lr=0.05)
    for _ in range(steps):
        adam.zero_grad()
        (bradley_terry(rows @ weights)[0].mean() + l2 * weights.square().sum()).backward()
        adam.step()
    return dict(zip(words, weights.tolist(), strict=True))


def accuracy(words: dict[str, float], pairs: Sequence[Pair]) -> float:
    """The share of pairs whose chosen reply it prefers."""
    texts = [reply for pair in pairs for reply in (pair.chosen, pair.rejected)]
    scores = counts(texts, list(words)) @ torch.tensor(list(words.values()))
    return bradley_terry(scores)[1]["accuracy"].mean().item()
