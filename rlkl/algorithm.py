"""What a configuration does to numbers: its advantage, selector, loss and KL terms, looked up and tried once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlkl.advantages import ADVANTAGES
from rlkl.config import resolve
from rlkl.errors import UserError
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES, REFUSED
from rlkl.losses import LOSSES, SELECTORS
from rlkl.preflight import check_plugins, needs_exact_kl
from rlkl.schema import Config
from rlkl.types import Batch


@dataclass
class Algorithm:
    """The functions that a config names, options bound."""

    advantage: Callable[..., tuple[Tensor, Tensor | None]]
    selector: Callable[[Batch, Tensor], Tensor] | None
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    kl_ref: Callable[..., Tensor]  # in the reward (logprobs, ref_logprobs), in the loss (new, batch); → (B, T)
    kl_old: Callable[..., Tensor]  # (new, batch) → (B, T)
    exact: bool  # does kl_ref read the exact KLs of Policy.evaluate(batch, reference)?


def algorithm(cfg: Config) -> Algorithm:
    """UserError on a name or an option that does not exist, a trap that is refused, a plug-in that does not work."""
    advantage, loss = resolve(cfg.advantage, ADVANTAGES, "advantage"), resolve(cfg.loss, LOSSES, "loss")
    selector = resolve(cfg.selector, SELECTORS, "selector") if cfg.selector else None
    names = cfg.advantage["name"], cfg.loss["name"]
    check_plugins(advantage, loss, names, group_size=cfg.sampling.group_size, critic=cfg.model.critic != "none",
                  dense=in_reward(cfg), baseline=cfg.sampling.baseline != "none", selector=selector)
    kl_ref, kl_old = kl_terms(cfg)
    exact = cfg.kl_ref.coef > 0 and cfg.kl_ref.place == "loss" and needs_exact_kl(kl_ref)
    return Algorithm(advantage, selector, loss, kl_ref, kl_old, exact)


def kl_terms(cfg: Config) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The two KLs. UserError on a pair of place and estimator that would hold nothing."""
    place, name = trap = cfg.kl_ref.place, cfg.kl_ref.estimator
    table = KL if place == "reward" else KL_LOSSES
    if cfg.kl_ref.coef > 0 and trap in REFUSED:
        raise UserError(
            f"kl_ref.place={place} with kl_ref.estimator={name}: {REFUSED[trap]}; choose {', '.join(table)}")
    if cfg.kl_ref.coef == 0:
        table = KL | KL_LOSSES  # k1 in the loss is refused only once it is switched on
    return estimator("kl_ref", name, table), estimator("kl_old", cfg.kl_old.estimator, KL_OLD_LOSSES)


def estimator(section: str, name: str, table: dict[str, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    if name not in table and ":" not in name:
        raise UserError(f"{section}.estimator={name!r}: choose {', '.join([*table, 'file.py:function'])}")
    return resolve({"name": name}, table, section)


def in_reward(cfg: Config) -> bool:
    return cfg.kl_ref.coef > 0 and cfg.kl_ref.place == "reward"


def reads_old(cfg: Config) -> bool:
    """Does anything need pi_old before the first update on a rollout? If not, it is the pi of that update.

    Several updates, a KL in the reward, care for the mismatch, a critic or a selector each do.
    """
    care = {cfg.mismatch.truncate, cfg.mismatch.reject} != {"none"}
    return updates(cfg) > 1 or in_reward(cfg) or care or cfg.model.critic != "none" or cfg.selector is not None


def updates(cfg: Config) -> int:
    """Optimizer steps per rollout, if no group is dropped."""
    rows = cfg.sampling.rows
    return cfg.optim.epochs * -(-rows // (cfg.optim.minibatch or rows))
