"""Dynamic sampling: other prompts where all replies to one score the same, and draws of the prompts that teach most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from rlkl.schema import Config
from rlkl.seeds import generator, in_turn
from rlkl.types import Batch, Example

RATE = 0.5  # of the running success: a prompt comes back rarely, and by then the policy is another one
FLOOR = 0.05  # beside p(1 - p), which is at most 0.25: no prompt is given up


class Rollout(NamedTuple):
    """Replies to N prompts, judged."""

    batch: Batch  # N G rows
    scores: Tensor  # (N G,)
    row: dict[str, float]  # metrics
    sample: dict[str, Any]


class Progress(Protocol):
    """What is kept from step to step."""

    step: int
    refilled: int  # prompts drawn beyond N a step
    success: dict[str, float]  # running, of each prompt that was drawn; keys are indices as text, as JSON has them


ActAndJudge = Callable[[list[Example], Generator], Rollout]


def dynamic(cfg: Config, train: Sequence[Example], state: Progress, act_and_judge: ActAndJudge, rng: Generator
            ) -> Rollout:
    """A rollout of sampling.prompts prompts and those that refill it. `state` changes only once all is judged."""
    how = cfg.sampling
    if how.curriculum == "success":
        order = by_success(state.success, len(train), cfg.seed, state.step)
    else:
        order = in_turn(len(train), cfg.seed, state.step * how.prompts + state.refilled)
    chosen = list(islice(order, how.prompts))
    rounds = [act_and_judge([train[i] for i in chosen], rng)]
    for number in range(how.refills if how.unanimous == "refill" else 0):
        more = list(islice(order, missing(rounds[-1], how.group_size)))
        if more:
            rng = generator(cfg.seed, state.step, f"refill {number}")
            rounds.append(act_and_judge([train[i] for i in more], rng))
            chosen += more
    row = dict(rounds[0].row)
    if how.unanimous == "refill":
        state.refilled += (refilled := len(chosen) - how.prompts)
        row |= {"refilled": refilled, "tokens": sum(r.row["tokens"] for r in rounds)}
    if how.curriculum != "none":
        state.success = success(state.success, chosen, torch.cat([r.scores for r in rounds]))
        row |= solved(state.success)
    return joined(rounds)._replace(row=row)


def missing(last: Rollout, group_size: int) -> int:
    """How many groups of a rollout are unanimous. As many prompts are sampled next (DAPO, arXiv:2503.14476, sec. 3.2,
    samples until N groups are not), so only those of the last round are still missing."""
    return round(last.row["unanimous"] * len(last.scores) / group_size)


def joined(rounds: Sequence[Rollout]) -> Rollout:
    """All rows of the rounds; of the first alone where there is no group that differs, and so nothing to choose."""
    if all(r.row["unanimous"] == 1 for r in rounds):
        return rounds[0]
    batch = Batch.cat([r.batch for r in rounds]) if len(rounds) > 1 else rounds[0].batch
    return rounds[0]._replace(batch=batch, scores=torch.cat([r.scores for r in rounds]))


def success(before: Mapping[str, float], chosen: Sequence[int], scores: Tensor) -> dict[str, float]:
    """The share of right replies, of score 1 or more, as an exponential average for each prompt that was ever drawn.

    scores: those of the replies to each of the `chosen` prompts, "(n g)"; NaN is none.
    """
    after = dict(before)
    for index, group in zip(map(str, chosen), scores.view(len(chosen), -1), strict=True):
        scored = group[~group.isnan()]
        if len(scored):
            share = (scored >= 1).float().mean().item()
            after[index] = after[index] + RATE * (share - after[index]) if index in after else share
    return after


def solved(success: Mapping[str, float]) -> dict[str, float]:
    """Of the prompts drawn so far: the share that every reply ever sampled has solved, and that none has."""
    shares = [*success.values()]
    count = max(len(shares), 1)
    return {"solved_always": shares.count(1.0) / count, "solved_never": shares.count(0.0) / count}


def learnability(success: Mapping[str, float], count: int) -> Tensor:
    """(count,) p(1 - p) + FLOOR: p(1 - p) is the variance of a score of 0 or 1 (Foster & Foerster, arXiv:2502.12272).

    A prompt that was never drawn has p = 1/2.
    """
    shares = torch.full((count,), 0.5, dtype=torch.float64)
    for index, share in success.items():
        shares[int(index)] = share
    return shares * (1 - shares) + FLOOR


def by_success(success: Mapping[str, float], count: int, seed: int, step: int) -> Iterator[int]:
    """Indices drawn by learnability: each once before any comes again."""
    weights, rng = learnability(success, count), generator(seed, step, "curriculum")
    return cycle(torch.multinomial(weights, count, generator=rng).tolist())
