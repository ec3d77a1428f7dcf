"""The arms of the experiment: each a list of overrides of configs/question.yaml, which has both KL and clip."""

from __future__ import annotations

from typing import NamedTuple

CONFIG = "configs/question.yaml"
SEEDS = (1, 2, 3)
UPDATES = {  # epochs on a rollout: gently, and hard
    4: ("optim.epochs=4", "optim.lr=1e-3", "optim.steps=40"),
    16: ("optim.epochs=16", "optim.lr=3e-3", "optim.steps=25"),
}
NO_CLIP, NO_KL = "loss=surrogate", "kl_ref.coef=0"
CORNERS = {"neither": (NO_CLIP, NO_KL), "clip": (NO_KL,), "kl": (NO_CLIP,), "both": ()}
ESTIMATORS = {  # where KL(pi || ref) is charged and how: (place, estimator), and the coefficients
    "k1": (("reward", "k1"), (0.15, 0.3, 0.4, 0.5, 0.7, 1, 2)),
    "k3": (("loss", "k3"), (0.3, 0.5, 0.6, 0.7, 0.8, 1, 1.4, 2, 4)),
    "exact": (("loss", "exact_pi_ref"), (0.3, 0.5, 0.7, 1, 2)),
    "wk3_token": (("loss", "wk3_token"), (0.3, 0.5, 0.7, 1, 2)),
    "wk3_prefix": (("loss", "wk3_prefix"), (0.3, 0.5, 0.7, 1, 2)),
    "rao_blackwell": (("loss", "rao_blackwell"), (0.3, 0.5, 0.7, 1, 2)),
}


class Arm(NamedTuple):
    group: str  # "4" and "16", the corners by epochs; or the estimator of a sweep over beta
    name: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}/{self.seed}"


def corners(epochs: int, seed: int) -> list[Arm]:
    return [Arm(str(epochs), name, seed, (*UPDATES[epochs], *changes)) for name, changes in CORNERS.items()]


def sweeps(seed: int) -> list[Arm]:
    """With the clip and 4 epochs: every estimator at every beta."""
    return [Arm(group, f"{beta:g}", seed, (*UPDATES[4], f"kl_ref.place={place}", f"kl_ref.estimator={estimator}",
                                           f"kl_ref.coef={beta:g}"))
            for group, ((place, estimator), betas) in ESTIMATORS.items() for beta in betas]


def grid(seeds: tuple[int, ...] = SEEDS) -> list[Arm]:
    return [arm for seed in seeds for epochs in (16, 4) for arm in corners(epochs, seed)] + [
        arm for seed in seeds for arm in sweeps(seed)]


def quick() -> list[Arm]:
    return corners(16, SEEDS[0])
