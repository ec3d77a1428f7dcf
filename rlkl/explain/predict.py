"""The closed form of the policy that a configuration leads to, as far as one is known: from what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.algorithm import Algorithm, in_reward
from rlkl.errors import UserError, first_line
from rlkl.explain.measure import (
    FORWARD,
    NOTHING,
    OTHER,
    SEQUENCE,
    Credit,
    ascends_score,
    credit,
    entropy_coef,
    is_k1,
    kl_gradient,
    reinforce_factor,
    without_kl,
)
from rlkl.explain.optimum import forward_tilted, tilted, token_level
from rlkl.explain.tabular import Game, probabilities, table_of
from rlkl.explain.verify import Expected
from rlkl.schema import Config


class Prediction(NamedTuple):
    """A closed form in symbols, and its (R,) probabilities on a game."""

    symbols: str
    joint: Tensor


@dataclass
class Law:
    """What decides where a configuration leads: its parts as they were measured."""

    cfg: Config
    algorithm: Algorithm
    credit: Credit
    factor: float | None  # the loss is this many times REINFORCE at ratio 1
    entropy: float
    kl: str  # whose gradient the KL has: NOTHING, SEQUENCE, TOKEN, FORWARD, OTHER

    @property
    def held(self) -> bool:
        """Does a KL hold the policy to the reference?"""
        return self.kl != NOTHING

    @property
    def beta(self) -> float:
        """The coefficient of the KL beside a policy gradient of strength 1."""
        return self.cfg.kl_ref.coef

    @property
    def effective_entropy(self) -> float | None:
        """The coefficient of the entropy beside E[score] - effective_beta KL; None where there is no such number."""
        if self.entropy == 0:
            return 0.0
        if self.credit.slope is None or self.factor is None:
            return None
        return self.entropy / (self.credit.slope * self.factor)

    @property
    def effective_beta(self) -> float | None:
        """The coefficient at which E[score] - beta KL has the same optimum; None where there is no such number."""
        if self.beta == 0 or in_reward(self.cfg):
            return self.beta
        if self.credit.slope is None or self.factor is None:
            return None
        return self.beta / (self.credit.slope * self.factor)


def law(cfg: Config, algorithm: Algorithm) -> Law:
    """Measured; UserError where a function of somebody's own does not work on so small a game."""
    try:
        if cfg.kl_ref.coef == 0:
            kl = NOTHING
        elif in_reward(cfg):
            kl = SEQUENCE if is_k1(algorithm.kl_ref) else OTHER
        else:
            kl = kl_gradient(algorithm)
        return Law(cfg, algorithm, credit(cfg, algorithm), reinforce_factor(algorithm.loss, per_token=False),
                   entropy_coef(algorithm.loss), kl)
    except Exception as error:  # a plug-in may fail in any way
        raise UserError("the configuration cannot be measured: one of its functions failed on a game of one or two "
                        f"tokens: {type(error).__name__}: {first_line(error)}") from error


def predict(found: Law, game: Game, measured: Tensor) -> Prediction | None:
    """None if no closed form is known. `measured` (R,) serves those that refer to the policy itself."""
    ref = probabilities(game, game.table)
    by_token = found.factor is not None and game.mask.shape[1] > 1 and not same_on_all_tokens(found, game)
    if found.factor is None or (by_token and reinforce_factor(found.algorithm.loss, per_token=True) is None):
        return None
    if not found.held and found.entropy == 0:
        return Prediction("ref on the replies of the best score", tilted(ref, game.scores, 0)) \
            if found.credit.rises else None
    if found.kl == OTHER:
        return None
    if found.held and in_reward(found.cfg):
        return in_the_reward(found, game, ref)
    return in_the_loss(found, game, ref, measured)


def in_the_reward(found: Law, game: Game, ref: Tensor) -> Prediction | None:
    """pi*, if no gradient is left there: a γ, or a scale that differs from token to token, leaves one."""
    beta, star = found.beta, tilted(ref, game.scores, found.beta)
    if found.entropy == 0:
        _, left = Expected(found.cfg, found.algorithm, game).ascent(table_of(game, star))
        return Prediction("ref · exp(score/beta)", star) if left < 1e-8 else None
    if found.credit.slope is None or game.mask.shape[1] > 1:
        return None
    s, e = found.credit.slope, found.entropy / found.factor
    joint = ((s * game.scores + s * beta * ref.log()) / (s * beta + e)).softmax(0)
    return Prediction("(ref^beta · exp(score))^(1/(beta + c))", joint)


def in_the_loss(found: Law, game: Game, ref: Tensor, measured: Tensor) -> Prediction | None:
    """Linear advantages have a form in the scores; others one in their own mean advantage, A(pi)."""
    beta, e = (x / found.factor for x in (found.beta, found.entropy))
    beta = beta if found.held else 0.0
    expected, short = Expected(found.cfg, found.algorithm, game), game.mask.shape[1] == 1
    cfg = with_group(found.cfg, expected.rollouts[2])  # smaller groups than asked for
    slope = credit(cfg, found.algorithm).slope
    if slope is None and not same_on_all_tokens(found, game):
        return None
    if slope is not None and not ascends_score(cfg, found.algorithm, game, slope):
        return None
    a = game.scores * slope if slope is not None else expected.mean_advantage(table_of(game, measured))[:, 0]
    what = "A(pi)" if slope is None else "score" if abs(slope - 1) < 1e-9 else f"{slope:.6g} score"
    if found.kl == FORWARD:
        if e:
            return None
        return Prediction(f"beta · ref / (λ - {what}){'' if short else ', prefix by prefix'}",
                          token_level(game, a, partial(forward_tilted, beta=beta)))
    if found.kl == SEQUENCE and not short:
        return None if e else Prediction(f"ref · exp({what}/beta)", tilted(ref, a, beta))
    symbols = f"ref · exp({what}/beta)" if not e else f"(ref^beta · exp({what}))^(1/(beta + c))"
    return Prediction(symbols + ("" if short else ", prefix by prefix"),
                      token_level(game, a, lambda p, q: ((beta * p.log() + q) / (beta + e)).softmax(0)))


def with_group(cfg: Config, size: int) -> Config:
    return replace(cfg, sampling=replace(cfg.sampling, group_size=size))


def same_on_all_tokens(found: Law, game: Game) -> bool:
    """Does each reply have one advantage, as group estimators give, or one a token?"""
    expected, joint = Expected(without_kl(found.cfg), found.algorithm, game), probabilities(game, game.table)
    old = expected.base.ref_logprobs
    a = expected.advantages(joint, old)
    return bool(torch.allclose(a, a[:, :1].expand_as(a), atol=1e-9))
