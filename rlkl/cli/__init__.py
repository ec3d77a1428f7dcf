"""The command `rlkl`: everything beside training, which is `python train.py CONFIG [a.b=c …]`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rlkl.cli import chat, dpo, evaluate, explain, export, label, report, reward_model, sft
from rlkl.errors import exit_code

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "explain": explain.main,
    "sft": sft.main,
    "label": label.main,
    "reward-model": reward_model.main,
    "dpo": dpo.main,
    "eval": evaluate.main,
    "chat": chat.main,
    "report": report.main,
    "export": export.main,
}


def main(argv: list[str] | None = None) -> int:
    """Run `rlkl COMMAND …` and return its exit code. Without a command: list them."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n")
        for name, command in COMMANDS.items():
            print(f"  rlkl {name:13s} {(command.__doc__ or '').splitlines()[0]}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: no command {argv[0]!r}; there is {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return exit_code(COMMANDS[argv[0]], argv[1:])
