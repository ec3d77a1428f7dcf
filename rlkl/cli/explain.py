"""What a configuration really optimises; with --verify, where its own functions lead."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from rlkl.algorithm import algorithm
from rlkl.config import load
from rlkl.errors import UserError
from rlkl.explain import explain, on_cuda
from rlkl.explain.measure import games_for
from rlkl.explain.optimum import kl_divergence, tilted, total_variation
from rlkl.explain.predict import Prediction, law, predict
from rlkl.explain.tabular import Game, probabilities
from rlkl.explain.verify import Expected, compares_groups, converge
from rlkl.schema import Config
from rlkl.terminal import console

USAGE = """usage: rlkl explain [CONFIG.yaml …] [key=value …] [--verify]

  --verify   follow the exact expected gradient of the very functions that the config names, yours included, on two
             enumerated games in float64, and print where it ends beside the closed form"""

CONVERGED = 1e-9  # the largest gradient of an end


def main(argv: list[str]) -> None:
    """what a configuration optimises, its optimum, its traps, its size; --verify measures it"""
    if {"-h", "--help"} & set(argv):
        console.print(escape(USAGE))
        return
    if unknown := [a for a in argv if a.startswith("-") and a != "--verify"]:
        raise UserError(f"rlkl explain has no option {unknown[0]!r}; it takes --verify")
    cfg = load([a for a in argv if a != "--verify"])
    for topic, lines in explain(cfg, on_cuda(cfg)).topics.items():
        console.print(f"\n[bold]{topic}[/]")
        for line in lines:
            console.print("  " + escape(line))
    if "--verify" in argv:
        verify(cfg)


def verify(cfg: Config) -> None:
    """One table a game: each reply's probability under ref, as measured, and by the closed form."""
    chosen = algorithm(cfg)
    if chosen.selector is not None:
        raise UserError("--verify enumerates rollouts one by one, and a selector ranks the tokens of a whole one: "
                        "leave the selector out to verify the rest")
    found = law(cfg, chosen)
    for game in games_for(cfg, chosen):
        expected = Expected(cfg, chosen, game)
        table, left = converge(expected)
        show(cfg, game, expected, table, left, predict(found, game, expected.probability(table).detach()))


def show(
    cfg: Config, game: Game, expected: Expected, table: Tensor, left: float, prediction: Prediction | None
) -> None:
    """One table and what it adds up to."""
    measured, ref = expected.probability(table).detach(), probabilities(game, game.table)
    rows, _, group = expected.rollouts
    smaller = f", in groups of {group}" if group != cfg.sampling.group_size else ""
    if compares_groups(expected.algorithm, cfg):
        smaller = f", in rollouts of {rows.shape[1]} replies"
    columns = ["reply", "score", "ref", "measured"] + (["closed form"] if prediction else [])
    lines = Table(*columns, title=f"{game.name}{smaller}", title_justify="left")
    for i, reply in enumerate(game.replies):
        cells = [" ".join(map(str, reply[game.mask[i]].tolist())), f"{game.scores[i]:g}", f"{ref[i]:.6f}",
                 f"{measured[i]:.6f}", *([f"{prediction.joint[i]:.6f}"] if prediction else [])]
        lines.add_row(*cells)
    console.print()
    console.print(lines)
    summary = [f"mean score {measured @ game.scores:.6f}   KL(pi || ref) {kl_divergence(measured, ref):.6f} nats   "
             f"gradient left {left:.1e}{'' if left < CONVERGED else ': it is still on its way'}"]
    summary.append(f"closed form   pi ∝ {prediction.symbols}   TV {total_variation(measured, prediction.joint):.1e}"
                 if prediction else "closed form   none is known")
    if cfg.kl_ref.coef > 0:
        summary.append("pi*           pi ∝ ref · exp(score/beta), the optimum of E[score] - beta KL(pi || ref)   "
                       f"TV {total_variation(measured, tilted(ref, game.scores, cfg.kl_ref.coef)):.1e}")
    console.print("\n".join("  " + escape(line) for line in summary))
