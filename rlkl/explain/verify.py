"""What the functions of a configuration converge to: their exact expected gradient on an enumerated game, followed.

Nothing is sampled and nothing is imitated: every rollout is put through the configuration's own advantage, loss and KL
terms, weighted by its probability, and differentiated. On-policy, one update a rollout; a trust region moves no fixed
point, only the way there.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlkl.algorithm import Algorithm, in_reward
from rlkl.explain.tabular import IMPOSSIBLE, Game, exact_values, multisets, policy_of, probabilities, visited
from rlkl.losses import token_weights
from rlkl.rewards import token_rewards
from rlkl.schema import Config
from rlkl.types import Batch, Evaluation

MOST = 6000  # rows of all rollouts together; groups are made smaller until they fit


@dataclass
class Expected:
    """The expectation, over all rollouts, of one update of `algorithm` on `game`."""

    cfg: Config
    algorithm: Algorithm
    game: Game

    @cached_property
    def rollouts(self) -> tuple[Tensor, Tensor, int]:
        """Every rollout as rows of the game's replies (E, n), the log of its orders (E,), and its group size."""
        kinds, group = len(self.game.replies), self.cfg.sampling.group_size
        if not self.crossing:
            while group > 2 and math.comb(kinds + group - 1, group) * group > MOST:
                group -= 1
            return *multisets(kinds, group), group
        group = min(group, 2) if sees_groups(self.algorithm, self.cfg) else 1
        if group == 1:
            return *multisets(kinds, 3), 1  # every three replies; else every pair of groups of two
        groups, orders = multisets(kinds, group)
        pairs = torch.tensor(list(itertools.combinations_with_replacement(range(len(groups)), 2)))
        twice = (pairs[:, 0] != pairs[:, 1]).to(orders.dtype) * math.log(2)
        return groups[pairs].flatten(1), orders[pairs].sum(1) + twice, group

    @cached_property
    def crossing(self) -> bool:
        return compares_groups(self.algorithm, self.cfg)

    @cached_property
    def base(self) -> Batch:
        """Each reply of the game once, scored by the reference."""
        batch = self.game.batch
        batch.ref_logprobs = policy_of(self.game.table).evaluate(batch).logprobs.detach()
        return batch

    @cached_property
    def columns(self) -> Tensor:
        return visited(self.game)

    def probability(self, table: Tensor) -> Tensor:
        """(R,) of each reply."""
        return probabilities(self.game, table)

    def rewards(self, old: Tensor) -> Tensor:
        """(R, T) what each token is paid; old (R, T) log-probs."""
        rewards = token_rewards(self.game.scores, self.game.mask)
        if in_reward(self.cfg):
            rewards = rewards - self.cfg.kl_ref.coef * self.algorithm.kl_ref(old, self.base.ref_logprobs)
        return rewards.masked_fill(~self.game.mask, 0.0)

    def advantages(self, joint: Tensor, old: Tensor) -> Tensor:
        """(E·n, T) of every row of every rollout, by the configuration's function; old (R, T) log-probs."""
        mask, rewards, values = self.game.mask, self.rewards(old), None
        if self.cfg.model.critic != "none":  # a critic that has converged
            values = exact_values(self.game, joint, rewards)
        elif self.cfg.sampling.baseline != "none":
            values = self.game.scores[joint.argmax()].expand(mask.shape)
        rows, _, group = self.rollouts
        calls = rows if self.crossing else rows.flatten()[None]
        return torch.cat([self.algorithm.advantage(
            rewards[r], None if values is None else values[r], mask[r], group_size=group)[0] for r in calls])

    def mean_advantage(self, table: Tensor) -> Tensor:
        """(R, T) E[A | reply] under the policy of `table`."""
        with torch.no_grad():
            joint, old = self.probability(table), policy_of(table).evaluate(self.base).logprobs
            per_row = self.row_probability(joint)
            total = torch.zeros_like(old).index_add_(
                0, self.rollouts[0].flatten(), per_row[:, None] * self.advantages(joint, old))
        return total / joint.clamp_min(1e-300)[:, None]

    def row_probability(self, joint: Tensor) -> Tensor:
        """(E·n,) P(rollout) / n on each of its rows."""
        rows, orders, _ = self.rollouts
        chances = (orders + joint.clamp_min(1e-300).log()[rows].sum(1)).exp()
        return (chances / rows.shape[1]).repeat_interleave(rows.shape[1])

    def loss(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The expected loss, with the leaf (V, D) it depends on, and pi(reply) (R,)."""
        policy = policy_of(table)
        reference = policy_of(self.game.table) if self.algorithm.exact else None
        new = policy.evaluate(self.base, reference)
        old, joint = new.logprobs.detach(), self.probability(table)
        rows = self.rollouts[0].flatten()
        batch = self.base[rows]
        batch.old_logprobs = batch.sampler_logprobs = old[rows]
        batch.old_entropy = new.entropy.detach()[rows]
        batch.rewards, batch.advantages = self.rewards(old)[rows], self.advantages(joint, old)
        new = Evaluation(*(None if x is None else x[rows] for x in new))
        if self.cfg.model.critic != "none":
            batch.values = batch.returns = torch.zeros_like(batch.advantages)
            new = new._replace(values=torch.zeros_like(batch.advantages))
        per_token, _ = self.algorithm.loss(new, batch)
        if self.cfg.kl_ref.coef > 0 and not in_reward(self.cfg):
            per_token = per_token + self.cfg.kl_ref.coef * self.algorithm.kl_ref(new, batch)
        if self.cfg.kl_old.coef > 0:
            per_token = per_token + self.cfg.kl_old.coef * self.algorithm.kl_old(new, batch)
        mask, width = self.game.mask, self.game.mask.shape[1]
        weights = width * token_weights(mask, self.cfg.optim.weights, width, totals=(1, width))
        total = ((self.row_probability(joint)[:, None] * weights[rows]) * per_token)[batch.mask].sum()
        return total, policy.head.weight, joint

    def ascent(self, table: Tensor) -> tuple[Tensor, float]:
        """(V, D) the natural gradient of each choice, downhill of the loss, and the largest plain gradient."""
        total, leaf, joint = self.loss(table)
        (gradient,) = torch.autograd.grad(total, leaf)
        reached = torch.zeros_like(table[0])
        for t in range(self.columns.shape[1]):
            inside = self.game.mask[:, t]
            reached.index_add_(0, self.columns[inside, t], joint.detach()[inside])
        mass = table.softmax(0) * reached
        possible = self.game.table > IMPOSSIBLE
        natural = torch.where(possible, -gradient / mass.clamp_min(1e-300), 0.0)
        return natural.clamp(-5, 5), float(gradient.abs().max())


def compares_groups(algorithm: Algorithm, cfg: Config) -> bool:
    """Does the advantage of one prompt's replies depend on another prompt's, as whitening over a batch makes it?"""
    group = cfg.sampling.group_size
    return not torch.allclose(*(probe(algorithm, group, second, group)[:group] for second in (True, False)))


def sees_groups(algorithm: Algorithm, cfg: Config) -> bool:
    """Does it matter which replies are to one prompt?"""
    group = cfg.sampling.group_size
    return not torch.allclose(*(probe(algorithm, group, True, size) for size in (group, 1)))


def probe(algorithm: Algorithm, rows: int, second: bool, group: int) -> Tensor:
    """Advantages of 2 · `rows` replies of one token, in groups of `group`; the `second` half scores like the first."""
    rewards = (torch.arange(2 * rows, dtype=torch.float64) % 2)[:, None]
    rewards[rows:] *= second
    return algorithm.advantage(rewards, torch.zeros_like(rewards), torch.ones_like(rewards).bool(), group_size=group)[0]


def converge(expected: Expected, rate: float = 1.0, steps: int = 5000, tolerance: float = 1e-13
             ) -> tuple[Tensor, float]:
    """Follow the natural gradient from the reference to where it ends: the table, and the gradient that is left.

    The step halves where the direction turns round, and grows again where it does not.
    """
    table, before, size = expected.game.table.clone(), None, 0.5 * rate
    for _ in range(steps):
        direction, left = expected.ascent(table)
        if left < tolerance:
            break
        if float((size * table.softmax(0) * direction).abs().max()) < 1e-16:
            break  # the last digits go to and fro
        if before is not None:
            turned = float((table.softmax(0) * direction * before).sum()) < 0
            size = size / 2 if turned else min(1.1 * size, rate)
        table, before = table + size * direction, direction
    return table, left
