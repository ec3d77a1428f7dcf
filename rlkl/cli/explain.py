"""`rlkl explain`: what a configuration really optimises; with --verify, where it converges."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from torch import Tensor

from rlkl.errors import UserError
from rlkl.explain import explain, on_cuda
from rlkl.explain.from_trl import VERSION, translate
from rlkl.explain.measure import games_for
from rlkl.explain.optimum import kl_divergence, tilted, total_variation
from rlkl.explain.predict import Prediction, measure_algorithm, predict
from rlkl.explain.tabular import probabilities
from rlkl.explain.verify import Expected, converge
from rlkl.run import config
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.config import load
from rlkl.run.folder import flat
from rlkl.run.help import asks_for_help, every_option, show_help
from rlkl.run.schema import Config
from rlkl.run.terminal import console, log_line

USAGE = """usage: rlkl explain [CONFIG.yaml …] [key=value …] [--verify]
       rlkl explain --trl FILE.yaml [CONFIG.yaml …] [key=value …] [--verify]

  --trl      translate the fields of TRL's GRPOConfig in FILE.yaml, print them as a configuration of
             ours with what differs and what is not here, and explain that; the output is YAML with
             comments, to be saved and run
  --verify   follow the exact expected gradient of the functions that the config names, user code
             included, on two enumerated games in float64, and compare its end with the closed form
"""

NOT_IN_GRPO_CONFIG = ("model.name", "task", "reward")
CONVERGED = 1e-9  # largest entry of the gradient at an end


def main(argv: list[str]) -> None:
    if asks_for_help(argv):
        show_help(argv, USAGE, every_option(argv))
        return
    arguments, trl_file = take_trl_file([a for a in argv if a != "--verify"])
    if unknown := [a for a in arguments if a.startswith("-")]:
        raise UserError(f"rlkl explain has no option {unknown[0]!r}; it takes --verify, --trl FILE")
    if trl_file is None:
        cfg, comment = load(arguments), ""
    else:
        cfg, comment = translated(trl_file, arguments), "# "
    for topic, lines in explain(cfg, on_cuda(cfg)).topics.items():
        console.print(f"\n{comment}[bold]{topic}[/]")
        for line in lines:
            log_line(f"{comment}  {line}")
    if "--verify" in argv:
        verify(cfg)


def take_trl_file(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments without --trl FILE, and the file; None where it is not among them."""
    if "--trl" not in argv:
        return argv, None
    at = argv.index("--trl")
    if at + 1 == len(argv):
        raise UserError("--trl needs the YAML file of a GRPOConfig: rlkl explain --trl FILE.yaml")
    return [*argv[:at], *argv[at + 2 :]], argv[at + 1]


def translated(file: str, overrides: list[str]) -> Config:
    """The configuration of TRL in a file as one of ours, changed by the overrides; it is printed.

    What is not an option is a comment. Raises UserError where the file cannot be translated.
    """
    if not Path(file).is_file():
        raise UserError(f"--trl {file}: no such file")
    translation = translate(config.read_yaml(Path(file)), file)
    tree: dict = {}
    for key, value in translation.options.items():
        tree = config.merge(tree, config.nested(key, value))
    tree = config.overridden(tree, overrides)
    cfg = config.build(config.merge(config.defaults(), tree))
    log_line(f"# {file}, a GRPOConfig of TRL {VERSION}, on one device")
    log_line(config.yaml_text(tree).rstrip())
    for title, notes in (
        ("not here", translation.left_out),
        ("not quite the same here", translation.differs),
        ("TRL does not read", translation.unread),
    ):
        if notes:
            log_line(f"\n# {title}")
        for text in dict.fromkeys(notes.values()):
            fields = ", ".join(name for name in notes if notes[name] == text)
            log_line(f"#   {fields}: {text}")
    if translation.around:
        log_line(f"\n# does not change what is optimised\n#   {', '.join(translation.around)}")
    given = flat(tree)
    if missing := [key for key in NOT_IN_GRPO_CONFIG if not any(k.startswith(key) for k in given)]:
        log_line(f"\n# to be added, as no GRPOConfig has it: {', '.join(missing)}")
    return cfg


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
