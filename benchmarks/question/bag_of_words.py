"""A reward model with a blind spot: it is learned from preferences and cannot see word order."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlkl.supervised.preferences import Pair, bradley_terry
from rlkl.types import Batch, Example


def bag_of_words(
    examples: Sequence[Example],
    responses: Sequence[str],
    batch: Batch,
    *,
    weights: str = "runs/question/reward.json",
) -> tuple[Tensor, dict[str, Tensor]]:
    """A reward: the sum of the words' learned weights, standardised on responses of the reference.

    weights: the file that `prepare` writes.
    """
    model = read(weights)
    words = model["words"]
    scores = counts(responses, list(words)) @ torch.tensor(list(words.values()))
    return ((scores - model["mean"]) / model["std"]).to(batch.mask.device), {}


@functools.cache
def read(path: str) -> dict:
    """The learned reward model: {"words": {word: weight}, "mean": …, "std": …}."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def counts(responses: Sequence[str], words: Sequence[str]) -> Tensor:
    """(B, W) how often each of W words occurs in each of B texts. Other words are not counted."""
    bags = [Counter(response.split()) for response in responses]
    return torch.tensor([[float(bag[word]) for word in words] for bag in bags])


def fit(pairs: Sequence[Pair], l2: float = 1e-3, steps: int = 300) -> dict[str, float]:
    """{word: weight}, by the Bradley-Terry loss of `rlkl reward-model` on bags of words."""
    texts = responses_of(pairs)
    words = sorted({word for text in texts for word in text.split()})
    bags = counts(texts, words)
    weights = torch.zeros(len(words), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        losses, _ = bradley_terry(bags @ weights)
        loss = losses.mean() + l2 * weights.square().sum()
        loss.backward()
        optimizer.step()
    return dict(zip(words, weights.tolist(), strict=True))


def responses_of(pairs: Sequence[Pair]) -> list[str]:
    """chosen, rejected, chosen, rejected, …"""
    return [response for pair in pairs for response in (pair.chosen, pair.rejected)]


def accuracy(words: dict[str, float], pairs: Sequence[Pair]) -> float:
    """The share of pairs whose chosen response scores higher than the rejected one."""
    texts = responses_of(pairs)
    scores = counts(texts, list(words)) @ torch.tensor(list(words.values()))
    return bradley_terry(scores)[1]["accuracy"].mean().item()
