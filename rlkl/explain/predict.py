"""The closed form of the policy that a configuration converges to, where one is known.

It follows from the measured parts of the configuration: `measure_algorithm`, then `predict`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

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
from rlkl.run.algorithm import Algorithm, kl_in_reward
from rlkl.run.schema import Config


class Prediction(NamedTuple):
    """A closed form in symbols, and its (R,) probabilities on a game."""

    symbols: str
    joint: Tensor


@dataclass
class MeasuredAlgorithm:
    """A configuration, and what was measured of its functions."""

    cfg: Config
    algorithm: Algorithm
    credit: Credit
    factor: float | None  # at ratio 1 the policy loss has this many times REINFORCE's gradient
    entropy: float  # coefficient of all entropy bonuses: the option, and any inside the loss
    kl: str  # whose gradient the KL has: NOTHING, SEQUENCE, TOKEN, FORWARD, OTHER

    @property
    def constrained(self) -> bool:
        """Does a KL constrain the policy to the reference?"""
        return self.kl != NOTHING

    @property
    def strength(self) -> float | None:
        """The policy gradient over the gradient of E[score]; None if they are not proportional."""
        if self.credit.slope is None or self.factor is None:
            return None
        return self.credit.slope * self.factor

    @property
    def effective_entropy(self) -> float | None:
        """The coefficient of the entropy beside E[score]; None where there is no such number."""
        if self.entropy == 0:
            return 0.0
        return None if self.strength is None else self.entropy / self.strength

    @property
    def effective_beta(self) -> float | None:
        """The beta at which E[score] - beta KL has the same optimum; None if there is none."""
        beta = self.cfg.kl_ref.coef
        if beta == 0 or kl_in_reward(self.cfg):
            return beta
        return None if self.strength is None else beta / self.strength


def measure_algorithm(cfg: Config, algorithm: Algorithm) -> MeasuredAlgorithm:
    """Measure the parts. UserError where a user's function does not work on so small a game."""
    try:
        return MeasuredAlgorithm(
            cfg=cfg,
            algorithm=algorithm,
            credit=credit(cfg, algorithm),
            factor=reinforce_factor(algorithm.policy_loss, per_token=False),
            entropy=entropy_coef(algorithm.policy_loss) + cfg.entropy.coef,
            kl=kind_of_kl(cfg, algorithm),
        )
    except Exception as error:  # user code may fail in any way
        raise UserError(
            "the configuration cannot be measured: one of its functions failed on a game of one "
            f"or two tokens: {type(error).__name__}: {first_line(error)}"
        ) from error


def kind_of_kl(cfg: Config, algorithm: Algorithm) -> str:
    """Whose gradient the KL has, where it is placed."""
    if cfg.kl_ref.coef == 0:
        return NOTHING
    if kl_in_reward(cfg):
        return SEQUENCE if is_k1(algorithm.kl_ref) else OTHER
    return kl_gradient(algorithm)


def predict(measured: MeasuredAlgorithm, game: Game, end: Tensor) -> Prediction | None:
    """The closed form on a game; None if none is known.

    end: (R,) where training ended. Forms that contain the mean advantage under pi itself read it.
    """
    factor = measured.factor
    if factor is None or not is_reinforce(measured, game):
        return None
    ref = probabilities(game, game.table)
    if not measured.constrained and measured.entropy == 0:
        if not measured.credit.rises:
            return None
        return Prediction("ref on the responses of the best score", tilted(ref, game.scores, 0))
    if measured.kl == OTHER:
        return None
    if measured.constrained and kl_in_reward(measured.cfg):
        return in_the_reward(measured, factor, game, ref)
    return in_the_loss(measured, factor, game, ref, end)


def is_reinforce(measured: MeasuredAlgorithm, game: Game) -> bool:
    """Does the policy loss have REINFORCE's gradient at ratio 1, with this game's advantages?"""
    if game.mask.shape[1] == 1 or same_on_all_tokens(measured, game):
        return True
    return reinforce_factor(measured.algorithm.policy_loss, per_token=True) is not None


def in_the_reward(
    measured: MeasuredAlgorithm, factor: float, game: Game, ref: Tensor
) -> Prediction | None:
    """pi*, if the gradient vanishes there. A discount, or a scale per token, leaves one."""
    beta = measured.cfg.kl_ref.coef
    if measured.entropy == 0:
        star = tilted(ref, game.scores, beta)
        expected = Expected(measured.cfg, measured.algorithm, game)
        _, left = expected.ascent(table_of(game, star))
        return Prediction("ref · exp(score/beta)", star) if left < 1e-8 else None
    slope = measured.credit.slope
    if slope is None or game.mask.shape[1] > 1:
        return None
    entropy = measured.entropy / factor
    logits = (slope * game.scores + slope * beta * ref.log()) / (slope * beta + entropy)
    return Prediction("(ref^beta · exp(score))^(1/(beta + c))", logits.softmax(0))


def in_the_loss(
    measured: MeasuredAlgorithm, factor: float, game: Game, ref: Tensor, end: Tensor
) -> Prediction | None:
    """A form in the scores where the advantage is linear in them, else in A(pi).

    A(pi) is the mean advantage of a response under the policy where training ended.
    """
    beta = measured.cfg.kl_ref.coef / factor if measured.constrained else 0.0
    entropy = measured.entropy / factor
    expected = Expected(measured.cfg, measured.algorithm, game)
    one_token = game.mask.shape[1] == 1
    cfg = with_group_size(measured.cfg, expected.rollouts[2])  # perhaps smaller groups
    slope = credit(cfg, measured.algorithm).slope
    if slope is None:
        if not same_on_all_tokens(measured, game):
            return None
        tilt = expected.mean_advantage(table_of(game, end))[:, 0]
        symbol = "A(pi)"
    else:
        if not ascends_score(cfg, measured.algorithm, game, slope):
            return None
        tilt = game.scores * slope
        symbol = "score" if abs(slope - 1) < 1e-9 else f"{slope:.6g} score"

    prefixes = "" if one_token else ", prefix by prefix"
    if measured.kl == FORWARD:
        if entropy:
            return None
        joint = token_level(game, tilt, partial(forward_tilted, beta=beta))
        return Prediction(f"beta · ref / (λ - {symbol}){prefixes}", joint)
    if measured.kl == SEQUENCE and not one_token:
        if entropy:
            return None
        return Prediction(f"ref · exp({symbol}/beta)", tilted(ref, tilt, beta))
    joint = token_level(
        game, tilt, lambda p, q: ((beta * p.log() + q) / (beta + entropy)).softmax(0)
    )
    if entropy:
        return Prediction(f"(ref^beta · exp({symbol}))^(1/(beta + c)){prefixes}", joint)
    return Prediction(f"ref · exp({symbol}/beta){prefixes}", joint)


def with_group_size(cfg: Config, size: int) -> Config:
    return replace(cfg, sampling=replace(cfg.sampling, group_size=size))


def same_on_all_tokens(measured: MeasuredAlgorithm, game: Game) -> bool:
    """Has each response one advantage, as group estimators give, and not one per token?"""
    expected = Expected(without_kl(measured.cfg), measured.algorithm, game)
    joint = probabilities(game, game.table)
    advantages = expected.advantages(joint, expected.base.ref_logprobs)
    return bool(torch.allclose(advantages, advantages[:, :1].expand_as(advantages), atol=1e-9))
