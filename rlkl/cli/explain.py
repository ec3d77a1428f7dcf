"""`rlkl explain`: what a configuration really optimises; with --verify, where it converges."""

from __future__ import annotations

from rich.table import Table
from torch import Tensor

from rlkl.errors import UserError
from rlkl.explain import explain, on_cuda
from rlkl.explain.measure import games_for
from rlkl.explain.optimum import kl_divergence, tilted, total_variation
from rlkl.explain.predict import Prediction, measure_algorithm, predict
from rlkl.explain.tabular import probabilities
from rlkl.explain.verify import Expected, converge
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.config import load
from rlkl.run.schema import Config
from rlkl.run.terminal import console, log_line

USAGE = """usage: rlkl explain [CONFIG.yaml …] [key=value …] [--verify]

  --verify   follow the exact expected gradient of the functions that the config names, user code
             included, on two enumerated games in float64, and compare its end with the closed form
"""

CONVERGED = 1e-9  # largest entry of the gradient at an end


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        log_line(USAGE)
        return
    if unknown := [a for a in argv if a.startswith("-") and a != "--verify"]:
        raise UserError(f"rlkl explain has no option {unknown[0]!r}; it takes --verify")
    cfg = load([a for a in argv if a != "--verify"])
    for topic, lines in explain(cfg, on_cuda(cfg)).topics.items():
        console.print(f"\n[bold]{topic}[/]")
        for line in lines:
            log_line(f"  {line}")
    if "--verify" in argv:
        verify(cfg)


def verify(cfg: Config) -> None:
    """Print one table per game: each response's probability as measured and in closed form."""
    algorithm = resolve_algorithm(cfg)
    if algorithm.selector is not None:
        raise UserError(
            "--verify enumerates rollouts one by one, and a selector ranks the tokens of a whole "
            "one: leave the selector out to verify the rest"
        )
    measured = measure_algorithm(cfg, algorithm)
    for game in games_for(cfg, algorithm):
        expected = Expected(cfg, algorithm, game)
        table, left = converge(expected)
        end = expected.probability(table).detach()
        prediction = predict(measured, game, end)
        console.print()
        console.print(response_table(expected, end.tolist(), prediction))
        for line in summary(expected, end, left, prediction):
            log_line(f"  {line}")


def response_table(expected: Expected, end: list[float], prediction: Prediction | None) -> Table:
    """One row per response: its tokens, its score and its probabilities."""
    game = expected.game
    columns = ["response", "score", "ref", "measured"]
    if prediction:
        columns.append("closed form")
    table = Table(*columns, title=game.name + enumerated(expected), title_justify="left")
    ref = probabilities(game, game.table).tolist()
    for i, response in enumerate(game.responses):
        ids = response[game.mask[i]].tolist()
        cells = [
            " ".join(str(token) for token in ids),
            f"{game.scores[i]:g}",
            f"{ref[i]:.6f}",
            f"{end[i]:.6f}",
        ]
        if prediction:
            cells.append(f"{prediction.joint[i]:.6f}")
        table.add_row(*cells)
    return table


def enumerated(expected: Expected) -> str:
    """The end of a title, where the rollouts are smaller than the configuration's."""
    rows, _, group_size = expected.rollouts
    if expected.across_groups:
        return f", in rollouts of {rows.shape[1]} responses"
    if group_size != expected.cfg.sampling.group_size:
        return f", in groups of {group_size}"
    return ""


def summary(
    expected: Expected, end: Tensor, left: float, prediction: Prediction | None
) -> list[str]:
    """Lines: where it ended, and how far that is from the closed form and from pi*."""
    game, beta = expected.game, expected.cfg.kl_ref.coef
    ref = probabilities(game, game.table)
    on_its_way = "" if left < CONVERGED else ": it has not converged"
    lines = [
        f"mean score {end @ game.scores:.6f}   KL(pi || ref) {kl_divergence(end, ref):.6f} nats   "
        f"gradient left {left:.1e}{on_its_way}"
    ]
    if prediction:
        distance = total_variation(end, prediction.joint)
        lines.append(f"closed form   pi ∝ {prediction.symbols}   TV {distance:.1e}")
    else:
        lines.append("closed form   none is known")
    if beta > 0:
        distance = total_variation(end, tilted(ref, game.scores, beta))
        lines.append(
            "pi*           pi ∝ ref · exp(score/beta), the optimum of E[score] - beta KL(pi || ref)"
            f"   TV {distance:.1e}"
        )
    return lines
