"""All that is random is a function of (seed, step, purpose): a resumed run needs no generator state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def stream(seed: int, step: int, purpose: str) -> int:
    """The seed of a generator for one purpose at one step."""
    return random.Random(f"{seed}/{step}/{purpose}").getrandbits(63)


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream(seed, step, purpose))


def draw(examples: Sequence[T], count: int, seed: int, step: int) -> list[T]:
    """The examples of a step: all of them once, in a random order, before any comes again."""
    chosen, order = [], None
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(examples))
        if order is None or place == 0:
            order = torch.randperm(len(examples), generator=generator(seed, epoch, "order")).tolist()
        chosen.append(examples[order[place]])
    return chosen
