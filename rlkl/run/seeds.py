"""All randomness is a function of (seed, step, purpose): a resumed run needs no generator state."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """The seed of a generator for one purpose at one step."""
    return random.Random(f"{seed}/{step}/{purpose}").getrandbits(63)


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, step, purpose))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of a step's rollout and updates.

    It seeds torch's and Python's global generators too, for plug-ins: the loop never uses those.
    """
    torch.manual_seed(derive_seed(seed, step, "plug-ins"))
    random.seed(derive_seed(seed, step, "plug-ins"))
    return generator(seed, step, "rollout")


def sample_examples(examples: Sequence[T], count: int, seed: int, step: int) -> list[T]:
    """The step-th block of `count` examples, in a shuffled order."""
    indices = epoch_order(len(examples), seed, step * count)
    return [examples[i] for i in islice(indices, count)]


def epoch_order(count: int, seed: int, start: int) -> Iterator[int]:
    """Indices from position `start` on: all in a random order before any comes again."""
    for epoch in itertools.count(start // count):
        order = torch.randperm(count, generator=generator(seed, epoch, "order")).tolist()
        yield from order[max(start - epoch * count, 0) :]
