"""Where a configuration converges: the exact expected gradient on an enumerated game, followed.

Nothing is sampled and nothing is re-implemented. Every possible rollout goes through the
configuration's own advantage, policy loss and KL terms, is weighted by its probability, and is
differentiated. On-policy, with one update per rollout: a trust region changes the path to a fixed
point, and not the fixed point.

Shapes: R responses of the game, E rollouts of n responses each, T tokens, (V, D) tables of logits.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlkl.advantages import token_rewards
from rlkl.explain.tabular import (
    IMPOSSIBLE,
    MIN_PROBABILITY,
    Game,
    exact_values,
    multisets,
    policy_of,
    probabilities,
    visited,
)
from rlkl.losses import token_weights
from rlkl.run.algorithm import Algorithm, kl_in_reward
from rlkl.run.schema import Config
from rlkl.types import Batch, PolicyOutput

MAX_ROWS = 6000  # of all rollouts together; groups are made smaller until they fit


@dataclass
class Expected:
    """The expectation, over all rollouts, of one update of `algorithm` on `game`."""

    cfg: Config
    algorithm: Algorithm
    game: Game

    @cached_property
    def rollouts(self) -> tuple[Tensor, Tensor, int]:
        """All rollouts: (E, n) rows of the game, the log (E,) of their orderings, the group size.

        The group size is the configuration's, or the largest that can be enumerated. An advantage
        that compares prompts gets rollouts of three responses, or of two groups of two.
        """
        kinds = len(self.game.responses)
        group_size = self.cfg.sampling.group_size
        if not self.across_groups:
            while group_size > 2 and rollout_rows(kinds, group_size) > MAX_ROWS:
                group_size -= 1
            rows, log_orderings = multisets(kinds, group_size)
            return rows, log_orderings, group_size
        if group_size == 1 or not uses_groups(self.algorithm, self.cfg):
            rows, log_orderings = multisets(kinds, 3)
            return rows, log_orderings, 1
        groups, log_orderings = multisets(kinds, 2)
        pairs = torch.tensor(list(itertools.combinations_with_replacement(range(len(groups)), 2)))
        different = (pairs[:, 0] != pairs[:, 1]).to(log_orderings.dtype)
        return groups[pairs].flatten(1), log_orderings[pairs].sum(1) + different * math.log(2), 2

    @cached_property
    def across_groups(self) -> bool:
        return compares_groups(self.algorithm, self.cfg)

    @cached_property
    def base(self) -> Batch:
        """Each response of the game once, scored by the reference."""
        batch = self.game.batch
        batch.ref_logprobs = policy_of(self.game.table)(batch).logprobs.detach()
        return batch

    @cached_property
    def columns(self) -> Tensor:
        return visited(self.game)

    def probability(self, table: Tensor) -> Tensor:
        """(R,) of each response."""
        return probabilities(self.game, table)

    def rewards(self, old_logprobs: Tensor) -> Tensor:
        """(R, T) the reward of each token; old_logprobs (R, T)."""
        rewards = token_rewards(self.game.scores, self.game.mask)
        if kl_in_reward(self.cfg):
            kl = self.algorithm.kl_ref(old_logprobs, self.base.ref_logprobs)
            rewards = rewards - self.cfg.kl_ref.coef * kl
        return rewards.masked_fill(~self.game.mask, 0.0)

    def advantages(self, joint: Tensor, old_logprobs: Tensor) -> Tensor:
        """(E·n, T) the advantages of every row of every rollout.

        joint: (R,) probabilities of the responses. old_logprobs: (R, T).
        """
        mask = self.game.mask
        rewards = self.rewards(old_logprobs)
        values = None
        if self.cfg.critic.kind != "none":  # a critic that has converged
            values = exact_values(self.game, joint, rewards)
        elif self.cfg.sampling.baseline != "none":
            values = self.game.scores[joint.argmax()].expand(mask.shape)
        rows, _, group_size = self.rollouts
        calls = rows if self.across_groups else rows.flatten()[None]
        advantages = []
        for r in calls:
            call_values = None if values is None else values[r]
            advantage, _ = self.algorithm.advantage(
                rewards[r], call_values, mask[r], group_size=group_size
            )
            advantages.append(advantage)
        return torch.cat(advantages)

    def mean_advantage(self, table: Tensor) -> Tensor:
        """(R, T) E[A | response] under the policy of `table`."""
        with torch.no_grad():
            joint = self.probability(table)
            old_logprobs = policy_of(table)(self.base).logprobs
            weighted = self.row_probability(joint)[:, None] * self.advantages(joint, old_logprobs)
            total = torch.zeros_like(old_logprobs)
            total.index_add_(0, self.rollouts[0].flatten(), weighted)
        return total / joint.clamp_min(MIN_PROBABILITY)[:, None]

    def row_probability(self, joint: Tensor) -> Tensor:
        """(E·n,) P(rollout) / n on each of its rows."""
        rows, log_orderings, _ = self.rollouts
        chances = (log_orderings + joint.clamp_min(MIN_PROBABILITY).log()[rows].sum(1)).exp()
        size = rows.shape[1]
        return (chances / size).repeat_interleave(size)

    def loss(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The expected loss, the (V, D) leaf that it depends on, and pi(response), (R,)."""
        policy = policy_of(table)
        reference = policy_of(self.game.table) if self.algorithm.exact_kl else None
        output = policy(self.base, reference)
        old_logprobs = output.logprobs.detach()
        joint = self.probability(table)
        rows = self.rollouts[0].flatten()
        batch = self.base[rows]
        batch.old_logprobs = batch.sampler_logprobs = old_logprobs[rows]
        batch.old_entropy = output.entropy.detach()[rows]
        batch.rewards = self.rewards(old_logprobs)[rows]
        batch.advantages = self.advantages(joint, old_logprobs)
        new = PolicyOutput(**{k: x[rows] for k, x in output._asdict().items() if x is not None})
        if self.cfg.critic.kind != "none":
            batch.values = batch.returns = torch.zeros_like(batch.advantages)
            new = new._replace(values=torch.zeros_like(batch.advantages))
        mask = self.game.mask
        width = mask.shape[1]
        weights = width * token_weights(mask, self.cfg.optim.weights, width, totals=(1, width))
        row_weights = self.row_probability(joint)[:, None] * weights[rows]
        total = (row_weights * self.objective(new, batch))[batch.mask].sum()
        return total, policy.head.weight, joint

    def objective(self, new: PolicyOutput, batch: Batch) -> Tensor:
        """(E·n, T) the loss of each token: the terms of train.py's `objective`, without a critic.

        A critic that has converged has no gradient. The coefficients are those of the first step.
        """
        cfg, algorithm = self.cfg, self.algorithm
        loss, _ = algorithm.policy_loss(new, batch)
        if cfg.entropy.coef:
            loss = loss - cfg.entropy.coef * new.entropy
        if cfg.kl_ref.coef > 0 and not kl_in_reward(cfg):
            loss = loss + cfg.kl_ref.coef * algorithm.kl_ref(new, batch)
        if cfg.kl_old.coef > 0:
            loss = loss + cfg.kl_old.coef * algorithm.kl_old(new, batch)
        return loss

    def ascent(self, table: Tensor) -> tuple[Tensor, float]:
        """(V, D) minus the natural gradient of the loss, and the largest entry of the gradient."""
        total, leaf, joint = self.loss(table)
        (gradient,) = torch.autograd.grad(total, leaf)
        reached = torch.zeros_like(table[0])
        for t in range(self.columns.shape[1]):
            inside = self.game.mask[:, t]
            reached.index_add_(0, self.columns[inside, t], joint.detach()[inside])
        mass = table.softmax(0) * reached
        possible = self.game.table > IMPOSSIBLE
        natural = torch.where(possible, -gradient / mass.clamp_min(MIN_PROBABILITY), 0.0)
        return natural.clamp(-5, 5), float(gradient.abs().max())


def rollout_rows(kinds: int, group_size: int) -> int:
    """Rows of all groups of this size together."""
    return math.comb(kinds + group_size - 1, group_size) * group_size


# ------------------------------------------------------------------ what an advantage compares


def compares_groups(algorithm: Algorithm, cfg: Config) -> bool:
    """Does the advantage of one prompt's responses depend on another prompt's scores?

    Whitening over a batch makes it depend.
    """
    size = cfg.sampling.group_size
    alike = probe(algorithm, size, second=True, group_size=size)[:size]
    zeros = probe(algorithm, size, second=False, group_size=size)[:size]
    return not torch.allclose(alike, zeros)


def uses_groups(algorithm: Algorithm, cfg: Config) -> bool:
    """Does it matter which responses belong to one prompt?"""
    size = cfg.sampling.group_size
    grouped = probe(algorithm, size, second=True, group_size=size)
    single = probe(algorithm, size, second=True, group_size=1)
    return not torch.allclose(grouped, single)


def probe(algorithm: Algorithm, rows: int, second: bool, group_size: int) -> Tensor:
    """Advantages of 2 · `rows` responses of one token, whose scores are 0, 1, 0, 1, …

    second: the second half has the scores of the first, else zeros.
    """
    rewards = (torch.arange(2 * rows, dtype=torch.float64) % 2)[:, None]
    rewards[rows:] *= second
    mask = torch.ones_like(rewards).bool()
    values = torch.zeros_like(rewards)
    advantages, _ = algorithm.advantage(rewards, values, mask, group_size=group_size)
    return advantages


# ------------------------------------------------------------------ convergence


def converge(
    expected: Expected, rate: float = 1.0, steps: int = 5000, tolerance: float = 1e-13
) -> tuple[Tensor, float]:
    """Follow the natural gradient from the reference until it ends.

    Returns the (V, D) table and the largest entry of the gradient there. The step size halves where
    the direction turns round, and grows again where it does not.
    """
    table = expected.game.table.clone()
    before = None
    size = 0.5 * rate
    for _ in range(steps):
        direction, left = expected.ascent(table)
        if left < tolerance:
            break
        if float((size * table.softmax(0) * direction).abs().max()) < 1e-16:
            break  # only the last digits still move
        if before is not None:
            turned = float((table.softmax(0) * direction * before).sum()) < 0
            size = size / 2 if turned else min(1.1 * size, rate)
        table, before = table + size * direction, direction
    return table, left
