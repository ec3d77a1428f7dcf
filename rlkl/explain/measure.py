"""Measure what the functions of a configuration do, by calling them.

No name is compared, so a user's function is measured like a built-in one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.explain.tabular import (
    BANDIT,
    BINARY,
    BINARY_TREE,
    TREE,
    Game,
    policy_of,
    probabilities,
    response_logprobs,
    table_of,
    visited,
)
from rlkl.explain.verify import Expected
from rlkl.policy.policy import Policy
from rlkl.run.algorithm import Algorithm
from rlkl.run.schema import Config
from rlkl.types import Batch, PolicyOutput

# Whose expected gradient a KL term has
NOTHING, SEQUENCE, TOKEN, FORWARD, OTHER = "nothing", "sequence", "token", "forward", "other"


# ------------------------------------------------------------------ the advantage


class Credit(NamedTuple):
    """How an advantage depends on the scores of a group."""

    slope: float | None  # E[A | response] = slope · (score - E score); None if it is not linear
    standardised: bool  # neither a shift nor a scale of the scores changes it
    rises: bool  # under the reference, the best score has the highest mean advantage


def games_for(cfg: Config, algorithm: Algorithm) -> list[Game]:
    """A game of one token and one of two, with scores that the advantage accepts.

    Some advantages divide by the mean score, or need scores of 0 and 1. ValueError if neither kind
    of game works.
    """
    for games in ([BANDIT, TREE], [BINARY, BINARY_TREE]):
        try:
            for game in games:
                Expected(cfg, algorithm, game).mean_advantage(game.table)
        except ValueError:
            continue
        return games
    raise ValueError("the advantage takes neither scores of any sign nor scores of 0 and 1")


def credit(cfg: Config, algorithm: Algorithm) -> Credit:
    """Measured on the game of one token without a KL, in groups that can be enumerated."""
    cfg = without_kl(cfg)
    group_size = cfg.sampling.group_size
    game = games_for(cfg, algorithm)[0]
    expected = Expected(cfg, algorithm, game)
    under_ref = expected.mean_advantage(game.table)[:, 0]
    best = under_ref >= under_ref.max() - 1e-9
    rises = bool(game.scores[best].min() == game.scores.max())

    slope = linear_slope(expected, game.table)
    other = linear_slope(expected, random_table(game, 1))
    linear = abs(slope - other) < 1e-9
    enumerated = expected.rollouts[2]
    if linear and enumerated > 1 and abs(slope - (enumerated - 1) / enumerated) < 1e-9:
        slope = (group_size - 1) / group_size  # the mean contains the response itself
    linear = linear and game is BANDIT  # with two different scores every function is linear
    standardised = not linear and is_standardised(cfg, algorithm, game)
    return Credit(slope if linear else None, standardised, rises)


def linear_slope(expected: Expected, table: Tensor) -> float:
    """The slope of E[A | response] over the score, up to a constant; NaN if it is not linear."""
    game = expected.game
    joint = probabilities(game, table)
    advantage = expected.mean_advantage(table)[:, 0]
    advantage = advantage - joint @ advantage  # a constant is a baseline
    score = game.scores - joint @ game.scores
    slope = float((joint * advantage * score).sum() / (joint * score**2).sum())
    return slope if torch.allclose(advantage, slope * score, atol=1e-9) else math.nan


def ascends_score(cfg: Config, algorithm: Algorithm, game: Game, slope: float) -> bool:
    """Is the policy gradient `slope` times the gradient of E[score]? It is not with a discount.

    Compared at one random policy.
    """
    table = random_table(game, 2)
    leaf = table.clone().requires_grad_()
    joint = probabilities(game, table)
    advantage = Expected(without_kl(cfg), algorithm, game).mean_advantage(table)
    logprobs = leaf.log_softmax(0)[game.responses, visited(game)]
    surrogate = (joint[:, None] * advantage * logprobs)[game.mask].sum()
    (policy_gradient,) = torch.autograd.grad(surrogate, leaf)
    (score_gradient,) = torch.autograd.grad(probabilities(game, leaf) @ game.scores, leaf)
    return torch.allclose(policy_gradient, slope * score_gradient, atol=1e-9)


def without_kl(cfg: Config) -> Config:
    return replace(cfg, kl_ref=replace(cfg.kl_ref, coef=0.0, target=None))


def is_standardised(cfg: Config, algorithm: Algorithm, game: Game) -> bool:
    """Do the scores R, R + 1 and 2 R get the same advantages?"""
    advantages = []
    for scores in (game.scores, game.scores + 1, 2 * game.scores):
        expected = Expected(cfg, algorithm, game._replace(scores=scores))
        try:
            advantages.append(expected.mean_advantage(game.table))
        except ValueError:
            return False
    return all(torch.allclose(advantages[0], other, atol=1e-3) for other in advantages[1:])


# ------------------------------------------------------------------ the KL to the reference


def is_k1(estimator: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Is an estimator for the reward log pi - log ref?"""
    logprobs, ref_logprobs = -torch.linspace(0.1, 3, 12, dtype=torch.float64).view(2, 2, 3)
    return torch.allclose(estimator(logprobs, ref_logprobs), logprobs - ref_logprobs, atol=1e-12)


def kl_gradient(algorithm: Algorithm) -> str:
    """Whose expected gradient a KL term in the loss has: NOTHING, SEQUENCE, TOKEN, FORWARD, OTHER.

    Measured on-policy, at a random policy of the two-token game.
    """
    table = random_table(TREE, 1)
    reference, policy = policy_of(TREE.table), policy_of(table)
    batch = TREE.batch
    batch.ref_logprobs = reference(batch).logprobs.detach()
    new = policy(batch, reference)
    batch.old_logprobs = new.logprobs.detach()
    joint = probabilities(TREE, table)
    term = (joint[:, None] * algorithm.kl_ref(new, batch))[batch.mask].sum()
    measured = table_gradient(term, policy)
    gradients = {
        NOTHING: torch.zeros_like(table),
        SEQUENCE: sequence_kl_gradient(table),
        TOKEN: token_kl_gradient(table),
        FORWARD: forward_kl_gradient(table),
    }
    for kind, gradient in gradients.items():
        if torch.allclose(measured, gradient, atol=1e-9):
            return kind
    return OTHER


def sequence_kl_gradient(table: Tensor) -> Tensor:
    """(V, D) ∇ KL(pi || ref) of whole responses."""
    leaf = table.clone().requires_grad_()
    logprobs = response_logprobs(TREE, leaf)
    kl = (logprobs.exp() * (logprobs - response_logprobs(TREE, TREE.table))).sum()
    return torch.autograd.grad(kl, leaf)[0]


def token_kl_gradient(table: Tensor) -> Tensor:
    """(V, D) ∇ Σ_t KL(pi || ref)(s_t), where the distribution of states is held fixed."""
    return state_gradient(table, lambda p, q: (p.exp() * (p - q)).sum(0))


def forward_kl_gradient(table: Tensor) -> Tensor:
    """(V, D) ∇ Σ_t KL(ref || pi)(s_t), where the distribution of states is held fixed."""
    return state_gradient(table, lambda p, q: (q.exp() * (q - p)).sum(0))


def state_gradient(table: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(V, D) gradient of the mean over states of divergence(log pi, log ref): 2 × (V, D) → (D,)."""
    leaf = table.clone().requires_grad_()
    joint = probabilities(TREE, table)
    per_state = divergence(leaf.log_softmax(0), TREE.table.log_softmax(0))
    mean = (joint[:, None] * per_state[visited(TREE)])[TREE.mask].sum()
    return torch.autograd.grad(mean, leaf)[0]


def table_gradient(loss: Tensor, policy: Policy) -> Tensor:
    """(V, D) gradient of the loss in the policy's table; zeros where it does not depend on it."""
    weight = policy.head.weight
    if not loss.requires_grad:
        return torch.zeros_like(weight)
    (gradient,) = torch.autograd.grad(loss, weight, allow_unused=True)
    return torch.zeros_like(weight) if gradient is None else gradient


def random_table(game: Game, seed: int) -> Tensor:
    """(V, D) the table of a random policy."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(game.scores), generator=generator, dtype=torch.float64)
    return table_of(game, noise.softmax(0))


# ------------------------------------------------------------------ the policy loss


def gradients(
    loss: Callable, ratio: float, advantages: Tensor, selected: bool = True
) -> tuple[Tensor, Tensor]:
    """-∂loss/∂log pi and -∂loss/∂entropy, both (B, T), of tokens with pi = ratio · pi_old.

    pi_old is 0.2 for every token. advantages: (B, T). selected: what a selector says of all tokens.
    """
    mask = torch.ones(advantages.shape, dtype=torch.bool)
    old_logprobs = torch.full(advantages.shape, 0.2, dtype=torch.float64).log()
    zeros = torch.zeros_like(old_logprobs)
    batch = Batch(
        prompt_ids=mask.long(),
        prompt_mask=mask,
        response_ids=mask.long(),
        mask=mask,
        sampler_logprobs=old_logprobs,
        truncated=mask[:, 0],
        old_logprobs=old_logprobs,
        ref_logprobs=old_logprobs,
        values=zeros,
        returns=zeros,
        old_entropy=-old_logprobs,
        advantages=advantages,
        rewards=advantages,
        weights=torch.ones_like(old_logprobs),
        selected=mask & selected,
    )
    logprobs = (old_logprobs + math.log(ratio)).requires_grad_()
    entropy = torch.ones_like(old_logprobs).requires_grad_()
    per_token, _ = loss(PolicyOutput(logprobs, entropy, zeros), batch)
    by_logprobs, by_entropy = torch.autograd.grad(
        per_token.sum(), (logprobs, entropy), allow_unused=True
    )
    return (
        zeros if by_logprobs is None else -by_logprobs,
        zeros if by_entropy is None else -by_entropy,
    )


def reinforce_factor(loss: Callable, per_token: bool) -> float | None:
    """c if the loss has the gradient -c · A at ratio 1, c > 0; else None.

    per_token: with advantages that differ from token to token, not only from response to response.
    """
    advantages = torch.tensor([[1.0, 1.0], [-0.5, -0.5], [0.3, 0.3]], dtype=torch.float64)
    if per_token:
        advantages = advantages * torch.tensor([1.0, -0.7])
    selected, _ = gradients(loss, 1.0, advantages, selected=True)
    others, _ = gradients(loss, 1.0, advantages, selected=False)
    factor = float(selected[0, 0])
    proportional = torch.allclose(selected, factor * advantages, atol=1e-9)
    return factor if proportional and torch.equal(selected, others) and factor > 0 else None


def entropy_coef(loss: Callable) -> float:
    """The coefficient of an entropy bonus inside a policy loss. Only a user's loss has one."""
    return float(gradients(loss, 1.0, torch.ones(1, 1, dtype=torch.float64))[1])


def gradient_weight(loss: Callable, ratio: float, sign: float, selected: bool = True) -> float:
    """-∂loss/∂log pi over A at pi = ratio · pi_old: 1 is REINFORCE, 0 a clipped token.

    sign: of the advantage, which is ±1.
    """
    advantages = torch.full((1, 1), sign, dtype=torch.float64)
    by_logprobs, _ = gradients(loss, ratio, advantages, selected)
    return float(by_logprobs) / sign + 0.0  # + 0.0 turns -0.0 into 0.0
