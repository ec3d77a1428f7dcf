"""The set-up in one picture: the models, and the two KLs as two arrows."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

KL_REF = "#0072B2"
KL_OLD = "#D55E00"
PLAIN = "0.35"
BOXES = {  # name → (centre, size, title, text, is it trained)
    "old": (
        (1.5, 4.1),
        (2.4, 1.1),
        "π_old",
        "sampled this rollout;\nonly its log-probs\nare kept",
        False,
    ),
    "pi": ((5.0, 4.1), (2.2, 1.1), "policy π", "being trained", True),
    "ref": (
        (8.5, 4.1),
        (2.4, 1.1),
        "reference",
        "the first policy, frozen:\na copy, or adapter off",
        False,
    ),
    "responses": ((1.4, 1.9), (2.2, 0.9), "responses y ~ π_old", "one rollout", False),
    "reward": ((3.87, 1.9), (1.75, 0.9), "reward r(y)", "a reward model,\nor a rule", False),
    "critic": (
        (8.5, 1.9),
        (2.4, 0.9),
        "baseline",
        "PPO: a critic V(s), trained;\nGRPO, RLOO: the group's mean",
        True,
    ),
    "advantage": ((6.0, 1.9), (1.5, 0.9), "advantage", "how much better\nthan expected", False),
}


def draw() -> Figure:
    """docs/question-setting.svg."""
    figure = Figure(figsize=(9, 4.3), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0.1, 9.9), ylim=(1.25, 5.75))
    axes.axis("off")
    for name in BOXES:
        box(axes, name)
    arrow(axes, (2.78, 4.1), (3.82, 4.1), KL_OLD, 3, "<|-|>")
    arrow(axes, (6.18, 4.1), (7.22, 4.1), KL_REF, 3, "<|-|>")
    label(
        axes,
        2.9,
        KL_OLD,
        "kl_old: KL(π_old ‖ π), or the clip",
        "The trust region: how far one rollout may take π;\n"
        "at the next it is 0 again. It changes the way there.",
    )
    label(
        axes,
        7.1,
        KL_REF,
        "kl_ref: KL(π ‖ ref)",
        "How far π may go at all, from first step to last.\nIt changes where training ends.",
    )
    arrow(axes, (1.5, 3.48), (1.5, 2.42), PLAIN)
    arrow(axes, (2.58, 1.9), (2.91, 1.9), PLAIN)
    arrow(axes, (4.83, 1.9), (5.17, 1.9), PLAIN)
    arrow(axes, (7.22, 1.9), (6.83, 1.9), PLAIN)
    arrow(axes, (5.9, 2.42), (5.1, 3.48), PLAIN)
    axes.text(5.7, 2.95, "the gradient of A · log π", fontsize=8, color=PLAIN)
    arrow(axes, (4.2, 3.48), (2.3, 3.48), PLAIN, bend=-0.35)
    axes.text(3.25, 2.92, "at the next rollout π is π_old", ha="center", fontsize=8, color=PLAIN)
    return figure


def box(axes: Axes, name: str) -> None:
    """A box with its title and text; green where something is trained."""
    (x, y), (width, height), title, text, trained = BOXES[name]
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.06",
            fc="#E8F5F0" if trained else "0.96",
            ec="#009E73" if trained else "0.5",
            lw=1.4,
        )
    )
    lines = text.count("\n") + 1
    axes.text(x, y + 0.11 * lines, title, ha="center", va="center", weight="bold", fontsize=10)
    axes.text(x, y + 0.11 * lines - 0.16, text, ha="center", va="top", fontsize=7.5)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str,
    width: float = 1.3,
    style: str = "-|>",
    bend: float = 0.0,
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=style,
            color=color,
            lw=width,
            mutation_scale=14,
            shrinkA=0,
            shrinkB=0,
            connectionstyle=f"arc3,rad={bend}",
            linestyle="--" if bend else "-",
        )
    )


def label(axes: Axes, x: float, color: str, title: str, text: str) -> None:
    axes.text(x, 5.4, title, ha="center", va="bottom", color=color, weight="bold", fontsize=11)
    axes.text(x, 5.35, text, ha="center", va="top", color=color, fontsize=8.5)
