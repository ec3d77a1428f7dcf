"""The arms of the experiment: overrides of configs/question.yaml, which has both KL and clip."""

from __future__ import annotations

from typing import NamedTuple

CONFIG = "configs/question.yaml"
SEEDS = (1, 2, 3)
UPDATES = {  # by epochs per rollout: few with a small learning rate, many with a large one
    4: ("optim.epochs=4", "optim.lr=1e-3", "optim.steps=40"),
    16: ("optim.epochs=16", "optim.lr=3e-3", "optim.steps=25"),
}
NO_CLIP = "loss=surrogate"
NO_KL = "kl_ref.coef=0"
CORNERS = {"neither": (NO_CLIP, NO_KL), "clip": (NO_KL,), "kl": (NO_CLIP,), "both": ()}
# How KL(pi || ref) is charged: (kl_ref.place, kl_ref.estimator), and the values of beta.
ESTIMATORS = {
    "k1": (("reward", "k1"), (0.15, 0.3, 0.4, 0.5, 0.7, 1, 2)),
    "k3": (("loss", "k3"), (0.3, 0.5, 0.6, 0.7, 0.8, 1, 1.4, 2, 4)),
    "exact": (("loss", "exact_pi_ref"), (0.3, 0.5, 0.7, 1, 2)),
    "wk3_token": (("loss", "wk3_token"), (0.3, 0.5, 0.7, 1, 2)),
    "wk3_prefix": (("loss", "wk3_prefix"), (0.3, 0.5, 0.7, 1, 2)),
    "rao_blackwell": (("loss", "rao_blackwell"), (0.3, 0.5, 0.7, 1, 2)),
}


class Arm(NamedTuple):
    """One run."""

    group: str  # "4" or "16", the epochs of a corner; or the estimator of a sweep over beta
    name: str  # a corner, or a value of beta
    seed: int
    overrides: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name of the arm in the file of results."""
        return f"{self.group}/{self.name}/{self.seed}"


def corners(epochs: int, seed: int) -> list[Arm]:
    """Clip on or off, KL on or off."""
    return [
        Arm(str(epochs), name, seed, (*UPDATES[epochs], *changes))
        for name, changes in CORNERS.items()
    ]


def sweeps(seed: int) -> list[Arm]:
    """Every estimator at each of its values of beta, with the clip and 4 epochs."""
    arms = []
    for group, ((place, estimator), betas) in ESTIMATORS.items():
        for beta in betas:
            kl = f"kl_ref.place={place}", f"kl_ref.estimator={estimator}", f"kl_ref.coef={beta:g}"
            arms.append(Arm(group, f"{beta:g}", seed, (*UPDATES[4], *kl)))
    return arms


def grid(seeds: tuple[int, ...] = SEEDS) -> list[Arm]:
    """All arms: the corners of every seed first."""
    all_corners = [arm for seed in seeds for epochs in (16, 4) for arm in corners(epochs, seed)]
    return all_corners + [arm for seed in seeds for arm in sweeps(seed)]


def quick() -> list[Arm]:
    """The corners at 16 epochs, of the first seed."""
    return corners(16, SEEDS[0])
