"""The functions that a configuration names: advantage, policy loss, KL terms, selector.

They are looked up, their options are bound, and they are tried once on a small random batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlkl.advantages import ADVANTAGES, Advantages
from rlkl.errors import UserError
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES, REFUSED
from rlkl.losses import LOSSES, SELECTORS, Loss
from rlkl.plugins import resolve
from rlkl.run.check_plugins import check_kl, check_plugins, needs_exact_kl
from rlkl.run.schema import Config
from rlkl.types import Batch, Rollout

# The KL to the reference changes slowly, and a pass of the reference takes about 14 % of a step.
REFERENCE_EVERY = 5


@dataclass
class Algorithm:
    """The functions of a configuration, with their options bound, and what they read."""

    advantage: Callable[..., Advantages]  # (rewards, values, mask, group_size=)
    policy_loss: Callable[..., Loss]  # (new, batch)
    kl_ref: Callable[..., Tensor]  # (new, batch); in the reward (logprobs, ref_logprobs)
    kl_old: Callable[..., Tensor]  # (new, batch)
    selector: Callable[[Batch, Tensor], Tensor] | None  # (batch, uniforms)
    exact_kl: bool  # kl_ref reads exact KLs, so it needs the reference's hidden states
    reads_old_logprobs: bool  # else pi_old is the pi of the only update, and is not computed twice
    only_advantages: bool  # where all advantages are 0, so is the gradient of the objective
    gamma: float  # the discount of V after the last token, with truncation=bootstrap
    rollout: Callable[..., Rollout] = field(init=False)  # (cfg, models, data, state, prompts, rng)


def resolve_algorithm(cfg: Config) -> Algorithm:
    """The functions that `cfg` names.

    Raises UserError on a name or an option that does not exist, on a combination that is refused,
    and on a plug-in that does not work.
    """
    advantage = resolve(cfg.advantage, ADVANTAGES, "advantage")
    policy_loss = resolve(cfg.loss, LOSSES, "loss")
    selector = resolve(cfg.selector, SELECTORS, "selector") if cfg.selector else None
    check_plugins(
        advantage,
        policy_loss,
        (cfg.advantage["name"], cfg.loss["name"]),
        group_size=cfg.sampling.group_size,
        critic=cfg.critic.kind != "none",
        dense=kl_in_reward(cfg),
        baseline=cfg.sampling.baseline != "none",
        selector=selector,
    )
    kl_ref, kl_old = kl_terms(cfg)
    if kl_in_reward(cfg):
        check_kl(kl_ref, "kl_ref.estimator", in_reward=True)
    if cfg.kl_old.coef > 0:
        check_kl(kl_old, "kl_old.estimator", in_reward=False)
    in_loss = cfg.kl_ref.coef > 0 and cfg.kl_ref.place == "loss"
    return Algorithm(
        advantage=advantage,
        policy_loss=policy_loss,
        kl_ref=kl_ref,
        kl_old=kl_old,
        selector=selector,
        exact_kl=in_loss and needs_exact_kl(kl_ref),
        reads_old_logprobs=reads_old_logprobs(cfg),
        only_advantages=only_advantages(cfg),
        gamma=bootstrap_discount(cfg, advantage.keywords),
    )


def kl_terms(cfg: Config) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """kl_ref and kl_old. UserError on an estimator that constrains nothing where it is placed."""
    place, name = cfg.kl_ref.place, cfg.kl_ref.estimator
    table = KL if place == "reward" else KL_LOSSES
    if cfg.kl_ref.coef > 0 and (place, name) in REFUSED:
        raise UserError(
            f"kl_ref.place={place} with kl_ref.estimator={name}: {REFUSED[place, name]}; choose "
            f"{', '.join(table)}"
        )
    if cfg.kl_ref.coef == 0:
        table = KL | KL_LOSSES  # k1 in the loss is refused only once it is switched on
    kl_ref = resolve_estimator("kl_ref", name, table)
    return kl_ref, resolve_estimator("kl_old", cfg.kl_old.estimator, KL_OLD_LOSSES)


def resolve_estimator(
    section: str, name: str, table: dict[str, Callable[..., Tensor]]
) -> Callable[..., Tensor]:
    if name not in table and ":" not in name:
        choices = ", ".join([*table, "file.py:function"])
        raise UserError(f"{section}.estimator={name!r}: choose {choices}")
    return resolve({"name": name}, table, section)


def bootstrap_discount(cfg: Config, options: dict[str, Any]) -> float:
    """γ of the advantage, by which V after a truncated response is discounted."""
    if cfg.truncation != "bootstrap":
        return 1.0
    if "gamma" not in options:
        raise UserError(
            f"truncation=bootstrap pays gamma · V after the last token, and "
            f"advantage.name={cfg.advantage['name']} has no option gamma: choose gae, "
            "or truncation=terminal or mask"
        )
    return options["gamma"]


def kl_in_reward(cfg: Config) -> bool:
    return cfg.kl_ref.coef > 0 and cfg.kl_ref.place == "reward"


def reads_reference(cfg: Config, step: int) -> bool:
    """Is a rollout scored by the reference in this step?

    Always where kl_ref is charged, or a user's function may read `ref_logprobs`. For the metrics
    alone, with model.reference=auto, in the first step and in every REFERENCE_EVERYth.
    """
    selects = cfg.selector is not None and cfg.selector["name"] not in SELECTORS
    kl_old = cfg.kl_old.coef > 0 and cfg.kl_old.estimator not in KL_OLD_LOSSES
    users = cfg.loss["name"] not in LOSSES or selects or kl_old
    number = step + 1  # as it is logged
    due = number == 1 or number % REFERENCE_EVERY == 0
    return cfg.model.reference is True or cfg.kl_ref.coef > 0 or users or due


def reads_old_logprobs(cfg: Config) -> bool:
    """Does anything read pi_old before the first update? If not, it is the pi of that update.

    Several updates, a KL in the reward, a mismatch correction, a critic and a selector each do.
    """
    corrects = cfg.mismatch.truncate != "none" or cfg.mismatch.reject != "none"
    critic = cfg.critic.kind != "none"
    selects = cfg.selector is not None
    return updates_per_rollout(cfg) > 1 or kl_in_reward(cfg) or corrects or critic or selects


def only_advantages(cfg: Config) -> bool:
    """Is the gradient of the objective 0 where all advantages are?

    Each policy loss of ours is positively homogeneous in them, but for a penalty on the tokens of
    a selector. A user's need not be.
    """
    kl_in_loss = cfg.kl_ref.coef > 0 and cfg.kl_ref.place == "loss"
    others = kl_in_loss or cfg.kl_old.coef > 0 or cfg.entropy.coef or cfg.critic.kind != "none"
    return cfg.loss["name"] in LOSSES and cfg.selector is None and not others


def updates_per_rollout(cfg: Config) -> int:
    """Optimizer steps per rollout, if no group is dropped."""
    rows = cfg.sampling.rows
    return cfg.optim.epochs * -(-rows // (cfg.optim.minibatch or rows))
