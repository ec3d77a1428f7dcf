"""Where training ends and how it gets there, on a game of three responses.

Every point is a policy. A path is the expected update of a configuration, step after step, by the
library's own functions (as in `rlkl explain --verify`); nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rlkl.explain.optimum import forward_tilted, tilted
from rlkl.explain.tabular import bandit, table_of
from rlkl.explain.verify import Expected
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.config import load

GAME = bandit((0.0, 0.7, 1.0), (0.7, 0.25, 0.05), "three responses of one token")
BETA = 0.3
COMMON = ("advantage=rloo", "loss=clip", "optim.weights=constant", "sampling.group_size=4")
OBJECTIVES = {  # label → (overrides, colour)
    "no KL to ref → the best response": (("kl_ref.coef=0",), "#D55E00"),
    "k1 in the reward → π*": ((f"kl_ref.coef={BETA}",), "#009E73"),
    "k3 in the loss → forward KL": (
        (f"kl_ref.coef={BETA}", "kl_ref.place=loss", "kl_ref.estimator=k3"),
        "#CC79A7",
    ),
}
# The reference, and two other policies.
STARTS = ((0.7, 0.25, 0.05), (0.04, 0.92, 0.04), (0.5, 0.05, 0.45))
# b / beta, the strength of the trust region → (what happens, steps, colour)
HOLD = {
    4.0: ("straight to π*", 14, "#009E73"),
    0.6: ("oscillates, arrives", 14, "#0072B2"),
    0.45: ("diverges: b < β/2", 5, "#D55E00"),
}
CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)


def expected(overrides: Sequence[str]) -> Expected:
    """The expected update of a configuration on the game."""
    cfg = load([*COMMON, *overrides])
    return Expected(cfg, resolve_algorithm(cfg), GAME)


def path(update: Expected, start: Tensor, size: float, steps: int) -> Tensor:
    """(steps + 1, 3) policies: natural-gradient steps of this size from `start`.

    With size = 1/b a step solves a rollout whose trust region is b · KL(pi || pi_old): it is a step
    of explicit Euler.
    """
    table = table_of(GAME, start)
    policies = []
    for _ in range(steps + 1):
        policies.append(table.softmax(0)[:3, 1])
        table = table + size * update.ascent(table)[0]
    return torch.stack(policies)


def ends() -> list[Tensor]:
    """The closed forms that the three objectives lead to."""
    ref = GAME.table.softmax(0)[:3, 1]
    return [
        tilted(ref, GAME.scores, 0.0),
        tilted(ref, GAME.scores, BETA),
        forward_tilted(ref, GAME.scores, BETA),
    ]


def draw() -> Figure:
    """docs/question-simplex.svg."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    starts = torch.tensor(STARTS, dtype=torch.float64)
    for axes in (left, right):
        triangle(axes)
        mark(axes, starts[0], "s", "black", "ref", (-14, 8))
    for (label, (overrides, color)), end in zip(OBJECTIVES.items(), ends(), strict=True):
        update = expected(overrides)
        for i, start in enumerate(starts):
            x, y = (path(update, start, 0.1, 600) @ CORNERS).T
            left.plot(x, y, color=color, lw=0.9 if i else 2.4, label=None if i else label)
        mark(left, end, "*", color)
    left.set_title("The KL to the reference decides where training ends")
    update = expected(OBJECTIVES["k1 in the reward → π*"][0])
    for hold, (text, steps, color) in reversed(HOLD.items()):
        x, y = (path(update, starts[0], 1 / (hold * BETA), steps) @ CORNERS).T
        right.plot(x, y, "o-", color=color, lw=1.5, ms=3.5, label=f"b = {hold:g} β: {text}")
    mark(right, ends()[1], "*", "#009E73", "π*", (9, 2))
    right.set_title("The trust region b · KL to π_old decides the way")
    for axes in (left, right):
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.04))
    return figure


def triangle(axes: Axes) -> None:
    """The simplex, with a response at each corner."""
    axes.plot(*CORNERS[[0, 1, 2, 0]].T, color="0.6", lw=1)
    axes.set_aspect("equal")
    axes.axis("off")
    texts = ("response 0, r = 0", "response 1, r = 0.7", "response 2, r = 1")
    offsets = ((0, -10), (0, -10), (54, 0))
    for corner, text, offset in zip(CORNERS.tolist(), texts, offsets, strict=True):
        axes.annotate(
            text,
            corner,
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
        )


def mark(
    axes: Axes,
    policy: Tensor,
    marker: str,
    color: str,
    text: str = "",
    place: tuple[int, int] = (0, 0),
) -> None:
    """A policy as a point, with a text beside it."""
    point = (policy @ CORNERS).tolist()
    size = 14 if marker == "*" else 6
    axes.plot(*point, marker, color=color, ms=size, mec="black", mew=0.7, zorder=5)
    axes.annotate(text, point, xytext=place, textcoords="offset points", fontsize=9, zorder=6)
