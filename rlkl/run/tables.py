"""What an option may name: the built-in functions, by the key of the option."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlkl.advantages import ADVANTAGES
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES
from rlkl.losses import LOSSES, SELECTORS
from rlkl.rewards import REWARDS
from rlkl.rollout import SAMPLERS
from rlkl.tasks import TASKS

TABLES: Mapping[str, Mapping[str, Callable]] = {
    "task": TASKS,
    "reward": REWARDS,
    "sampling.backend": SAMPLERS,
    "advantage": ADVANTAGES,
    "selector": SELECTORS,
    "loss": LOSSES,
    "kl_ref.estimator": KL | KL_LOSSES,
    "kl_old.estimator": KL_OLD_LOSSES,
}
