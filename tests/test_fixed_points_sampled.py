"""Where the real loop converges: train.training_step with real sampling, against closed forms.

The policy is a table in the form of a language model; the optimizer is a natural gradient with
falling steps; float64.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs_fixture import train

from rlkl.explain.tabular import BANDIT, TREE, Game, policy_of, probabilities, visited
from rlkl.rollout import SAMPLERS
from rlkl.run import config
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.build import Data, Heldout, Models
from rlkl.run.seeds import step_generator
from rlkl.run.state import State
from rlkl.types import Example, SamplingParams

# One token: five responses. Two tokens: three first ones, and three after each.
REF = np.array([0.35, 0.25, 0.20, 0.15, 0.05])
R = np.array([0.0, 0.5, 1.0, -0.5, 2.0])
ROOT = np.array([0.5, 0.3, 0.2])
LEAVES = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
SCORES = np.array([[1.0, 0.0, 2.0], [0.0, 1.5, 0.0], [0.5, 0.5, 1.0]])
TOLERANCE = 0.005


class NaturalGradient:
    """The optimizer: natural gradient descent in steps that fall as 1/t.

    The gradient of a logit is divided by its probability, and by how often the reference comes to
    choose there. half: rollouts until the step has halved.
    """

    def __init__(self, policy, game: Game, half: int) -> None:
        self.weight = policy.head.weight
        self.half = half
        self.rollouts = 0
        reached = torch.zeros_like(game.table[0])
        columns = visited(game)
        joint = probabilities(game, game.table)
        for t in range(columns.shape[1]):
            reached.index_add_(0, columns[:, t], joint)
        # optim.weights=constant divides by the width
        self.scale = columns.shape[1] / reached.clamp_min(1e-3)

    def step(self, lr_scale: float, loss: float = 0.0, frozen=()) -> dict[str, float]:
        with torch.no_grad():
            mass = self.weight.softmax(0).clamp_min(1e-3)
            direction = (self.scale * self.weight.grad / mass).clamp(-3, 3)
            self.weight -= direction / (1 + self.rollouts / self.half)
        self.zero()
        return {"policy": float(direction.norm())}

    def zero(self) -> None:
        self.weight.grad = None


class OnePromptTokenizer:
    """Every prompt is token 0; a response is its ids as text."""

    def __call__(self, prompt: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[0])

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids.tolist()))


def models_of(game: Game, half: int) -> Models:
    """The reference of the game as the policy. Every token that can be the last one is an EOS."""
    last = game.mask.sum(1) - 1
    eos_ids = game.responses[torch.arange(len(last)), last].unique().tolist()
    models = Models(
        policy=policy_of(game.table),
        tokenizer=OnePromptTokenizer(),
        sampler=SAMPLERS["naive"],
        params=SamplingParams(eos_ids=tuple(eos_ids)),
        reference=policy_of(game.table).requires_grad_(False),
    )
    models.optimizer = NaturalGradient(models.policy, game, half)
    return models


def data_of(game: Game) -> Data:
    """One prompt; a response scores what the game says."""
    score_of = {}
    for ids, mask, score in zip(game.responses, game.mask, game.scores.tolist(), strict=True):
        score_of[" ".join(map(str, ids[mask].tolist()))] = score

    def reward(examples, responses, batch):
        return torch.tensor([score_of[response] for response in responses]), {}

    heldout = Heldout([], reward, lambda example, response: {})
    return Data([Example("")], heldout, reward, scoring=None)


def trained(
    seed: int, game: Game, rollouts: int, half: int, options: str
) -> tuple[np.ndarray, list[dict]]:
    """(R,) the policy of the mean logits after the first third, and the metrics of each step."""
    width = game.mask.shape[1]
    given = [f"seed={seed}", f"sampling.max_new_tokens={width}", "optim.weights=constant"]
    cfg = config.load([*given, *options.split()])
    models, data, algorithm = models_of(game, half), data_of(game), resolve_algorithm(cfg)
    algorithm.rollout = train.generate_and_score
    state = State(cfg.kl_ref.coef, cfg.kl_old.coef)
    averaged = range(rollouts // 3, rollouts)
    mean = torch.zeros_like(game.table)
    rows = []
    for state.step in range(rollouts):
        models.optimizer.rollouts = state.step
        prompts = [0] * cfg.sampling.prompts
        rng = step_generator(cfg.seed, state.step)
        metrics, _ = train.training_step(cfg, models, algorithm, data, state, prompts, rng)
        rows.append(metrics)
        if state.step in averaged:
            mean += models.policy.head.weight.detach() / len(averaged)
    assert all(row["updates"] == cfg.optim.epochs for row in rows)
    assert all(row["truncated_fraction"] == 0 for row in rows)
    return probabilities(game, mean).numpy(), rows


def tv(p, q) -> float:
    return float(np.abs(p - q).sum() / 2)


def tilted(ref, r, beta) -> np.ndarray:
    x = ref * np.exp(r / beta)
    return x / x.sum()


def forward(ref, r, beta) -> np.ndarray:
    low, high = r.max() + 1e-12, r.max() + beta
    for _ in range(200):
        level = (low + high) / 2
        if (beta * ref / (level - r)).sum() > 1:
            low = level
        else:
            high = level
    return beta * ref / (level - r)


def by_token() -> np.ndarray:
    """The root is tilted by the mean score to come, not by its soft value."""
    leaves = np.stack([tilted(ref, r, 0.5) for ref, r in zip(LEAVES, SCORES, strict=True)])
    return (tilted(ROOT, (leaves * SCORES).sum(1), 0.5)[:, None] * leaves).ravel()


STAR = tilted(REF, R, 0.7)
WHOLE = tilted((ROOT[:, None] * LEAVES).ravel(), SCORES.ravel(), 0.5)
SURROGATE = "loss=surrogate kl_ref.coef=0.7"
TWO_TOKENS = "advantage=rloo loss=surrogate kl_ref.coef=0.5"
CELLS = {
    # game, closed form, its distance from the optimum, rollouts, rollouts until the step has
    # halved, options
    "rloo, k1 in the reward": (
        BANDIT,
        STAR,
        0,
        60,
        20,
        f"advantage=rloo {SURROGATE} sampling.prompts=32",
    ),
    "rloo, k1 in the reward, four epochs, clipped": (
        BANDIT,
        STAR,
        0,
        60,
        20,
        "advantage=rloo loss=clip optim.epochs=4 kl_ref.coef=0.7 sampling.prompts=32",
    ),
    "grpo's std, k1 in the reward": (
        BANDIT,
        STAR,
        0,
        150,
        5,
        f"advantage=grpo {SURROGATE} sampling.prompts=32",
    ),
    "rloo, k3 in the loss: forward": (
        BANDIT,
        forward(REF, R, 0.7),
        0.2788,
        80,
        20,
        f"advantage=rloo {SURROGATE} kl_ref.place=loss kl_ref.estimator=k3 sampling.prompts=128",
    ),
    "dr_grpo of two, k2 in the loss: twice beta": (
        BANDIT,
        tilted(REF, R, 1.4),
        0.2143,
        150,
        20,
        f"advantage=dr_grpo {SURROGATE} kl_ref.place=loss kl_ref.estimator=k2 "
        "sampling.prompts=512 sampling.group_size=2",
    ),
    "two tokens, rloo, k1 in the reward": (
        TREE,
        WHOLE,
        0,
        50,
        20,
        f"{TWO_TOKENS} sampling.prompts=32",
    ),
    "two tokens, rloo, w·k3 in the loss: by token": (
        TREE,
        by_token(),
        0.0733,
        75,
        20,
        f"{TWO_TOKENS} kl_ref.place=loss kl_ref.estimator=wk3_token sampling.prompts=64 "
        "sampling.group_size=16",
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("cell", CELLS)
def test_the_loop_with_real_sampling_ends_at_the_closed_form(cell, seed):
    """k1 in the reward leaves no noise at pi*, the others are averaged.

    A wrong form would be far outside the tolerance.
    """
    game, target, distance, rollouts, half, options = CELLS[cell]
    p, rows = trained(seed, game, rollouts, half, options)
    assert tv(p, target) < TOLERANCE
    assert tv(p, STAR if game is BANDIT else WHOLE) == pytest.approx(distance, abs=TOLERANCE)
    assert (rows[0].get("clip_fraction", 0) > 0.05) == ("epochs" in cell)
