"""Judge: reward(examples, replies, batch) -> (scores (B,), parts {name: (B,)}), and how scores become token rewards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from rlkl.errors import UserError
from rlkl.rewards.feedback import principle_judge
from rlkl.rewards.models import reward_model
from rlkl.types import Batch, Example

Reward = Callable[[Sequence[Example], Sequence[str], Batch], tuple[Tensor, dict[str, Tensor]]]


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
    """(B,) scores and their named parts. UserError where the reward raises, or gives not one finite number a reply."""
    try:
        scores, parts = reward(examples, replies, batch)
        scores = torch.as_tensor(scores, dtype=torch.float32, device=batch.mask.device)
    except Exception as error:  # somebody else's code may fail in any way
        raise refused(reward, f"raised {type(error).__name__}: {error}".splitlines()[0]) from error
    if scores.shape != (len(replies),):
        raise refused(reward, f"gave scores of shape {tuple(scores.shape)} for {len(replies)} replies")
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).long().argmax())
        raise refused(reward, f"gave {scores[row].item()} for the reply {replies[row]!r} to {examples[row].prompt!r}")
    return scores, parts


def refused(reward: Reward, why: str) -> UserError:
    function = getattr(reward, "func", reward)  # of a partial
    return UserError(f"the reward {getattr(function, '__name__', type(function).__name__)} {why}")


def informative(scores: Tensor, group_size: int) -> Tensor:
    """(B,) bool: the rows of groups whose scores differ (DAPO's dynamic sampling, arXiv:2503.14476, eq. 11).

    A unanimous group has no advantage, yet costs a forward and a backward pass. All rows if every group is unanimous.
    """
    groups = rearrange(scores, "(n g) -> n g", g=group_size)
    kept = repeat(groups.amax(1) != groups.amin(1), "n -> (n g)", g=group_size)
    return kept if kept.any() else torch.ones_like(kept)


def token_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """(B,) scores → (B, T): each on the last sampled token of its reply, the EOS if there is one; zero elsewhere."""
    last = mask.long().cumsum(1).argmax(1, keepdim=True)  # the first column that reaches the full count
    placed = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).scatter(1, last, scores[:, None])
    return placed.masked_fill(~mask, 0.0)


def with_overlong(reward: Reward, max_tokens: int, buffer: int, coef: float) -> Reward:
    """`reward` + coef · overlong, which is a named part of it."""

    @functools.wraps(reward)
    def shaped(examples: Sequence[Example], replies: Sequence[str], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores, parts = reward(examples, replies, batch)
        penalty = coef * overlong(batch.mask, max_tokens, buffer)
        scores = torch.as_tensor(scores, device=penalty.device)
        return scores + penalty, (parts or {"score": scores}) | {"overlong": penalty}

    return shaped


def overlong(mask: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """(B,) from 0 to -1 over the last `buffer` tokens of the room: DAPO's soft overlong punishment (eq. 13)."""
    return (max_tokens - buffer - mask.sum(1)).clamp(max=0) / buffer


REWARDS: dict[str, Callable] = {"judge": principle_judge, "reward_model": reward_model}
