"""Judge: reward(examples, replies, batch) -> (scores (B,), parts {name: (B,)}), and how scores become token rewards.

Scores are a tensor, or a list in which None says that the reward does not apply to that reply.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, nan

import torch
from einops import rearrange, repeat
from torch import Tensor

from rlkl.errors import UserError
from rlkl.rewards.feedback import principle_judge
from rlkl.rewards.models import reward_model
from rlkl.rewards.penalties import overlong, repetition
from rlkl.types import Batch, Example

Scores = Tensor | list[float | None]
Reward = Callable[[Sequence[Example], Sequence[str], Batch], tuple[Scores, dict[str, Tensor]]]


def from_task(score: Callable[[Example, str], float | dict[str, float]]) -> Reward:
    """The reward of a run without a `reward:` section: task.score of each reply; named parts are summed."""

    @functools.wraps(score)
    def reward(examples: Sequence[Example], replies: Sequence[str], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        judged = [score(e, r) for e, r in zip(examples, replies, strict=True)]
        rows = [j if isinstance(j, dict) else {"score": j} for j in judged]
        names = dict.fromkeys(name for r in rows for name in r)
        parts = {name: torch.tensor([float(r.get(name, 0.0)) for r in rows]) for name in names}
        return torch.stack(list(parts.values())).sum(0), parts if len(parts) > 1 else {}

    return reward


def judge(reward: Reward, examples: Sequence[Example], replies: Sequence[str], batch: Batch
          ) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) scores, NaN where the reward says None, and named parts. UserError where it raises or gives no number."""
    try:
        given, parts = reward(examples, replies, batch)
        numbers = [nan if s is None else s for s in given] if isinstance(given, list) else given
        scores = torch.as_tensor(numbers, dtype=torch.float32, device=batch.mask.device)
    except Exception as error:  # somebody else's code may fail in any way
        raise refused(reward, error) from error
    if scores.shape != (len(replies),) or not scores.isfinite().all():
        check(reward, given, scores, examples, replies)
    return scores, parts


def check(reward: Reward, given: Scores, scores: Tensor, examples: Sequence[Example], replies: Sequence[str]) -> None:
    """UserError if there is not one number a reply; None is one that does not exist."""
    if scores.shape != (len(replies),):
        raise refused(reward, f"gave scores of shape {tuple(scores.shape)} for {len(replies)} replies")
    for row in (~scores.isfinite()).nonzero().flatten().tolist():
        if not isinstance(given, list) or given[row] is not None:
            raise refused(
                reward, f"gave {scores[row].item()} for the reply {replies[row]!r} to {examples[row].prompt!r}")


def refused(reward: Reward, why: str | Exception) -> UserError:
    function = getattr(reward, "func", reward)  # of a partial
    if isinstance(why, UserError):  # it says itself what the matter is
        return why
    if isinstance(why, Exception):
        why = f"raised {type(why).__name__}: {why}".splitlines()[0]
    return UserError(f"the reward {getattr(function, '__name__', type(function).__name__)} {why}")


def optional(scores: Tensor) -> list[float | None]:
    """NaN as None: how a reward that is made of others says that none of them applies."""
    return [None if s != s else s for s in scores.tolist()]


def without_rows(batch: Batch, rows: Tensor) -> Batch:
    """The batch in which these rows, (B,) bool, have no token: nothing after this sees them, their group is smaller."""
    return replace(batch, mask=batch.mask & ~rows[:, None])


def informative(scores: Tensor, group_size: int) -> Tensor:
    """(B,) bool: the rows of groups whose scores differ (DAPO's dynamic sampling, arXiv:2503.14476, eq. 11).

    A unanimous group has no advantage, yet costs a forward and a backward pass. NaN is no score. All rows if every
    group is unanimous.
    """
    groups = rearrange(scores, "(n g) -> n g", g=group_size)
    kept = repeat(groups.nan_to_num(-inf).amax(1) > groups.nan_to_num(inf).amin(1), "n -> (n g)", g=group_size)
    return kept if kept.any() else torch.ones_like(kept)


def token_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """(B,) scores → (B, T): each on the last sampled token of its reply, the EOS if there is one; zero elsewhere."""
    last = mask.long().cumsum(1).argmax(1, keepdim=True)  # the first column that reaches the full count
    placed = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).scatter(1, last, scores[:, None])
    return placed.masked_fill(~mask, 0.0)


def weighted(rewards: Sequence[tuple[str, float, Reward]]) -> Reward:
    """(name, weight, reward) of each part → their weighted sum; a part that is None is left out of the sum of that row.

    Each is a named part, unweighted, and so are its own parts, as name/part.
    """

    def total(examples: Sequence[Example], replies: Sequence[str], batch: Batch) -> tuple[Scores, dict[str, Tensor]]:
        parts, sums = {}, torch.zeros(len(replies), device=batch.mask.device)
        applies = torch.zeros_like(sums, dtype=torch.bool)
        for name, weight, reward in rewards:
            scores, own = judge(reward, examples, replies, batch)
            parts |= {name: scores} | {f"{name}/{part}": torch.as_tensor(x) for part, x in own.items()}
            sums, applies = sums + weight * scores.nan_to_num(0.0), applies | ~scores.isnan()
        if failed := [x for name, x in parts.items() if name.endswith("/failed")]:
            parts["failed"] = torch.stack(failed).amax(0)  # in any of them
        return optional(sums.masked_fill(~applies, nan)), parts

    return total


def with_overlong(reward: Reward, max_tokens: int, buffer: int, coef: float) -> Reward:
    """`reward` + coef · overlong, which is a named part of it. A reply that has no score is not punished either."""

    @functools.wraps(reward)
    def shaped(examples: Sequence[Example], replies: Sequence[str], batch: Batch) -> tuple[Scores, dict[str, Tensor]]:
        scores, parts = judge(reward, examples, replies, batch)
        penalty = coef * overlong(batch.mask, max_tokens, buffer)
        return optional(scores + penalty), (parts or {"score": scores}) | {"overlong": penalty}

    return shaped


REWARDS: dict[str, Callable] = {"repetition": repetition, "judge": principle_judge, "reward_model": reward_model}
