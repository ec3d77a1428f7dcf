"""All that is random is a function of (seed, step, purpose): a resumed run needs no generator state."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")


def stream(seed: int, step: int, purpose: str) -> int:
    """The seed of a generator for one purpose at one step."""
    return random.Random(f"{seed}/{step}/{purpose}").getrandbits(63)


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream(seed, step, purpose))


def draw(examples: Sequence[T], count: int, seed: int, step: int) -> list[T]:
    """The examples of a step, if each has so many."""
    return [examples[i] for i in islice(in_turn(len(examples), seed, step * count), count)]


def in_turn(count: int, seed: int, start: int) -> Iterator[int]:
    """Indices, from a position on: all of them once, in a random order, before any comes again."""
    for epoch in itertools.count(start // count):
        order = torch.randperm(count, generator=generator(seed, epoch, "order")).tolist()
        yield from order[max(start - epoch * count, 0) :]
