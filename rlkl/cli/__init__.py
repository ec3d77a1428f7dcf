"""`rlkl COMMAND …`: what is beside training. Training stays `python train.py CONFIG [a.b=c …]`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rlkl.cli import chat, dpo, evaluate, explain, export, label, report, reward_model, sft
from rlkl.errors import UserError, of_a_file

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "explain": explain.main, "sft": sft.main, "label": label.main, "reward-model": reward_model.main, "dpo": dpo.main,
    "eval": evaluate.main, "chat": chat.main, "report": report.main, "export": export.main}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  rlkl {name:13s} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
        print("\n".join([__doc__ or "", *lines]))
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: no command {argv[0]!r}; there is {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        COMMANDS[argv[0]](argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {of_a_file(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
