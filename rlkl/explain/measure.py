"""What the functions of a configuration do, found out by calling them: no name is compared, yours are measured too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.algorithm import Algorithm
from rlkl.explain.tabular import (
    BANDIT,
    BINARY,
    BINARY_TREE,
    TREE,
    Game,
    policy_of,
    probabilities,
    reply_logprobs,
    table_of,
    visited,
)
from rlkl.explain.verify import Expected
from rlkl.model import Policy
from rlkl.schema import Config
from rlkl.types import Batch, Evaluation

NOTHING, SEQUENCE, TOKEN, FORWARD, OTHER = "nothing", "sequence", "token", "forward", "other"


class Credit(NamedTuple):
    """How an advantage depends on the scores of a group."""

    slope: float | None  # E[A | reply] = slope · (score - E score); None: not linear
    standardised: bool  # neither shift nor scale of the scores matters
    rises: bool  # at the reference, the reply of the best score has the best mean advantage


def games_for(cfg: Config, algorithm: Algorithm) -> list[Game]:
    """One of one token, one of two. Some advantages divide by the mean score, or need 0 and 1: they get such games."""
    for games in ([BANDIT, TREE], [BINARY, BINARY_TREE]):
        try:
            for game in games:
                Expected(cfg, algorithm, game).mean_advantage(game.table)
        except ValueError:
            continue
        return games
    raise ValueError("it takes neither scores of any sign nor scores of 0 and 1")


def credit(cfg: Config, algorithm: Algorithm) -> Credit:
    """Measured on a game of one token, without a KL in the reward, in groups that can be enumerated."""
    cfg, size = without_kl(cfg), cfg.sampling.group_size
    game = games_for(cfg, algorithm)[0]
    slopes = []
    for seed in (0, 1):
        table = random_table(game, seed) if seed else game.table
        expected = Expected(cfg, algorithm, game)
        a, joint = expected.mean_advantage(table)[:, 0], probabilities(game, table)
        a, deviation = a - joint @ a, game.scores - joint @ game.scores  # a constant is a baseline
        slope = float((joint * a * deviation).sum() / (joint * deviation**2).sum())
        slopes.append(slope if torch.allclose(a, slope * deviation, atol=1e-9) else math.nan)
        if not seed:
            rises = bool(game.scores[a >= a.max() - 1e-9].min() == game.scores.max())
    linear, group = abs(slopes[0] - slopes[1]) < 1e-9, expected.rollouts[2]
    if linear and group > 1 and abs(slopes[0] - (group - 1) / group) < 1e-9:
        slopes[0] = (size - 1) / size  # the mean contains the reply itself
    linear = linear and game is BANDIT  # of two scores everything is a linear function
    return Credit(slopes[0] if linear else None, not linear and standardised(cfg, algorithm, game), rises)


def ascends_score(cfg: Config, algorithm: Algorithm, game: Game, slope: float) -> bool:
    """Is the policy gradient `slope` times that of E[score], at a random policy? A discount makes it another."""
    table, leaf = random_table(game, 2), random_table(game, 2).requires_grad_()
    joint, a = probabilities(game, table), Expected(without_kl(cfg), algorithm, game).mean_advantage(table)
    chosen = leaf.log_softmax(0)[game.replies, visited(game)]
    (found,) = torch.autograd.grad((joint[:, None] * a * chosen)[game.mask].sum(), leaf)
    (wanted,) = torch.autograd.grad(probabilities(game, leaf) @ game.scores, leaf)
    return torch.allclose(found, slope * wanted, atol=1e-9)


def without_kl(cfg: Config) -> Config:
    return replace(cfg, kl_ref=replace(cfg.kl_ref, coef=0.0, target=None))


def standardised(cfg: Config, algorithm: Algorithm, game: Game) -> bool:
    """Do R, R + 1 and 2 R get the same advantages?"""
    found = []
    for scores in (game.scores, game.scores + 1, 2 * game.scores):
        try:
            found.append(Expected(cfg, algorithm, game._replace(scores=scores)).mean_advantage(game.table))
        except ValueError:
            return False
    return all(torch.allclose(found[0], other, atol=1e-3) for other in found[1:])


def kl_gradient(algorithm: Algorithm) -> str:
    """Whose expected gradient does a KL term in the loss have, on-policy, at a random policy of the two-token game?"""
    table = random_table(TREE, 1)
    reference, policy = policy_of(TREE.table), policy_of(table)
    batch = TREE.batch
    batch.ref_logprobs = reference.evaluate(batch).logprobs.detach()
    new = policy.evaluate(batch, reference)
    batch.old_logprobs = new.logprobs.detach()
    joint = probabilities(TREE, table)
    found = gradient((joint[:, None] * algorithm.kl_ref(new, batch))[batch.mask].sum(), policy)
    for kind, of in ((NOTHING, lambda _: torch.zeros_like(table)), (SEQUENCE, sequence_kl), (TOKEN, token_kl),
                     (FORWARD, forward_kl)):
        if torch.allclose(found, of(table), atol=1e-9):
            return kind
    return OTHER


def sequence_kl(table: Tensor) -> Tensor:
    """∇ KL(pi || ref) of whole replies."""
    leaf = table.clone().requires_grad_()
    u = reply_logprobs(TREE, leaf) - reply_logprobs(TREE, TREE.table)
    return torch.autograd.grad((reply_logprobs(TREE, leaf).exp() * u).sum(), leaf)[0]


def token_kl(table: Tensor) -> Tensor:
    """∇ Σ_t KL(pi || ref)(s_t), the states taken as they come."""
    return state_gradient(table, lambda p, q: (p.exp() * (p - q)).sum(0))


def forward_kl(table: Tensor) -> Tensor:
    """∇ Σ_t KL(ref || pi)(s_t), the states taken as they come."""
    return state_gradient(table, lambda p, q: (q.exp() * (q - p)).sum(0))


def state_gradient(table: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    leaf, joint, columns = table.clone().requires_grad_(), probabilities(TREE, table), visited(TREE)
    per_state = divergence(leaf.log_softmax(0), TREE.table.log_softmax(0))
    return torch.autograd.grad((joint[:, None] * per_state[columns])[TREE.mask].sum(), leaf)[0]


def gradient(loss: Tensor, policy: Policy) -> Tensor:
    found = torch.autograd.grad(loss, policy.head.weight, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(policy.head.weight) if found is None else found


def random_table(game: Game, seed: int) -> Tensor:
    noise = torch.randn(len(game.scores), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return table_of(game, noise.softmax(0))


def probe(loss: Callable, ratio: float, advantages: Tensor, selected: bool = True) -> tuple[Tensor, Tensor]:
    """-∂loss/∂log pi and -∂loss/∂entropy, (B, T), where each token has moved from pi_old = 0.2 to ratio · 0.2."""
    mask = torch.ones(advantages.shape, dtype=torch.bool)
    old = torch.full(advantages.shape, 0.2, dtype=torch.float64).log()
    batch = Batch(mask.long(), mask, mask.long(), mask, old, mask[:, 0], old_logprobs=old, ref_logprobs=old,
                  values=torch.zeros_like(old), returns=torch.zeros_like(old), old_entropy=-old, advantages=advantages,
                  rewards=advantages, weights=torch.ones_like(old), selected=mask & selected)
    leaves = (old + math.log(ratio)).requires_grad_(), torch.ones_like(old).requires_grad_()
    total = loss(Evaluation(*leaves, torch.zeros_like(old)), batch)[0].sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return tuple(torch.zeros_like(old) if g is None else -g for g in found)


def reinforce_factor(loss: Callable, per_token: bool) -> float | None:
    """c if at ratio 1 the loss has the gradient -c A, A of the reply, or of each token; None if it has another."""
    a = torch.tensor([[1.0, 1.0], [-0.5, -0.5], [0.3, 0.3]], dtype=torch.float64)
    if per_token:
        a = a * torch.tensor([1.0, -0.7])
    pulled, unselected = (probe(loss, 1.0, a, selected)[0] for selected in (True, False))
    factor = float(pulled[0, 0])
    right = torch.allclose(pulled, factor * a, atol=1e-9) and torch.equal(pulled, unselected)
    return factor if right and factor > 0 else None


def entropy_coef(loss: Callable) -> float:
    """The factor of new.entropy in the loss, sign turned."""
    return float(probe(loss, 1.0, torch.ones(1, 1, dtype=torch.float64))[1])


def pull(loss: Callable, ratio: float, sign: float, selected: bool = True) -> float:
    """-∂loss/∂log pi over A at pi = ratio · pi_old: 1 is REINFORCE, 0 a token that was stopped."""
    return float(probe(loss, ratio, torch.full((1, 1), sign, dtype=torch.float64), selected)[0]) / sign + 0.0


def is_k1(estimator: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Is a KL in the reward log pi - log ref?"""
    logprobs, ref = -torch.linspace(0.1, 3, 12, dtype=torch.float64).view(2, 2, 3)
    return torch.allclose(estimator(logprobs, ref), logprobs - ref, atol=1e-12)
