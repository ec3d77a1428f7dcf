"""Rewards: reward(examples, responses, batch) -> (scores, parts), one score for each response.

scores: (B,), or a list in which None means that the reward does not apply to that response. parts:
{name: (B,)}, what the score consists of, to be logged. After `compute_scores` None is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import nan

import torch
from torch import Tensor

from rlkl.errors import UserError
from rlkl.rewards.feedback import principle_judge
from rlkl.rewards.models import reward_model
from rlkl.rewards.penalties import overlong, repetition
from rlkl.types import Batch, Example

Scores = Tensor | list[float | None]
Reward = Callable[[Sequence[Example], Sequence[str], Batch], tuple[Scores, dict[str, Tensor]]]


def from_task(score: Callable[[Example, str], float | dict[str, float]]) -> Reward:
    """The reward of a run without a `reward:` section: task.score of each response.

    Where the task scores with named parts, their sum is the score.
    """

    @functools.wraps(score)
    def reward(
        examples: Sequence[Example], responses: Sequence[str], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = []
        for example, response in zip(examples, responses, strict=True):
            scored = score(example, response)
            rows.append(scored if isinstance(scored, dict) else {"score": scored})
        names = dict.fromkeys(name for row in rows for name in row)
        parts = {name: torch.tensor([float(row.get(name, 0.0)) for row in rows]) for name in names}
        scores = torch.stack(list(parts.values())).sum(0)
        return scores, parts if len(parts) > 1 else {}

    return reward


def compute_scores(
    reward: Reward, examples: Sequence[Example], responses: Sequence[str], batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The (B,) float32 scores of the responses, NaN where the reward gives None; and named parts.

    Raises UserError where the reward raises, and where it does not give one number per response.
    """
    try:
        given, parts = reward(examples, responses, batch)
        numbers = [nan if s is None else s for s in given] if isinstance(given, list) else given
        scores = torch.as_tensor(numbers, dtype=torch.float32, device=batch.mask.device)
    except Exception as error:  # user code may fail in any way
        raise reward_error(reward, error) from error
    if scores.shape != (len(responses),):
        shape = tuple(scores.shape)
        raise reward_error(reward, f"gave scores of shape {shape} for {len(responses)} responses")
    for row in (~scores.isfinite()).nonzero().flatten().tolist():
        if not isinstance(given, list) or given[row] is not None:
            raise reward_error(
                reward,
                f"gave {scores[row].item()} for the response {responses[row]!r} "
                f"to {examples[row].prompt!r}",
            )
    return scores, parts


def reward_error(reward: Reward, reason: str | Exception) -> UserError:
    """A UserError of one line that names the reward. A UserError is returned as it is."""
    if isinstance(reason, UserError):
        return reason
    if isinstance(reason, Exception):
        reason = f"raised {type(reason).__name__}: {reason}".splitlines()[0]
    function = getattr(reward, "func", reward)  # inside a functools.partial
    name = getattr(function, "__name__", type(function).__name__)
    return UserError(f"the reward {name} {reason}")


def nan_to_none(scores: Tensor) -> list[float | None]:
    """Scores as a reward returns them, where it is made of others and none of them applies."""
    return [None if s != s else s for s in scores.tolist()]


def weighted_sum(rewards: Sequence[tuple[str, float, Reward]]) -> Reward:
    """The reward Σ weight · score of several (name, weight, reward).

    A reward that gives None is left out of that response's sum; if all do, the sum is None. Each
    reward is a named part, unweighted, and its own parts are called name/part.
    """

    def total(
        examples: Sequence[Example], responses: Sequence[str], batch: Batch
    ) -> tuple[Scores, dict[str, Tensor]]:
        parts: dict[str, Tensor] = {}
        sums = torch.zeros(len(responses), device=batch.mask.device)
        applies = torch.zeros_like(sums, dtype=torch.bool)
        for name, weight, reward in rewards:
            scores, own_parts = compute_scores(reward, examples, responses, batch)
            sums = sums + weight * scores.nan_to_num(0.0)
            applies = applies | ~scores.isnan()
            parts[name] = scores
            for part, values in own_parts.items():
                parts[f"{name}/{part}"] = torch.as_tensor(values)
        failed = [values for name, values in parts.items() if name.endswith("/failed")]
        if failed:
            parts["failed"] = torch.stack(failed).amax(0)  # 1 where any of them failed
        return nan_to_none(sums.masked_fill(~applies, nan)), parts

    return total


def with_overlong(reward: Reward, max_tokens: int, buffer: int, coef: float) -> Reward:
    """`reward` + coef · overlong, which becomes a named part. None stays None."""

    @functools.wraps(reward)
    def shaped(
        examples: Sequence[Example], responses: Sequence[str], batch: Batch
    ) -> tuple[Scores, dict[str, Tensor]]:
        scores, parts = compute_scores(reward, examples, responses, batch)
        penalty = coef * overlong(batch.mask, max_tokens, buffer)
        if not parts.keys() - {"failed"}:
            parts = {"score": scores, **parts}
        return nan_to_none(scores + penalty), parts | {"overlong": penalty}

    return shaped


REWARDS: dict[str, Callable] = {
    "repetition": repetition,
    "judge": principle_judge,
    "reward_model": reward_model,
}
