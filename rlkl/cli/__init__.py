"""PPO and GRPO for language models: `rlkl train tiny-grpo` trains a tiny one, and needs no GPU."""

from __future__ import annotations

import sys
from importlib import import_module

from rlkl.errors import exit_code
from rlkl.run.names import did_you_mean

COMMANDS = {  # name → (its module in rlkl/cli, loaded only when it is run; what it does)
    "train": ("train", "train with PPO or GRPO, by a shipped configuration or your own"),
    "explain": ("explain", "what a configuration optimises, its optimum, its traps, its size"),
    "sft": ("sft", "teach a model the solutions of a task, or of a file of prompts and answers"),
    "label": ("label", "label pairs of responses as chosen and rejected, by any reward"),
    "reward-model": ("reward_model", "train a reward model on pairs of chosen and rejected"),
    "dpo": ("dpo", "prefer the chosen responses to the rejected ones, without a reward model"),
    "eval": ("evaluate", "held-out accuracy of a run before and after: sampled, greedy, pass@k"),
    "chat": ("chat", "talk to a run's policy before and after training, side by side"),
    "report": ("report", "compare runs in one table and, with out=FOLDER, one figure"),
    "export": ("export", "write a run's policy as an ordinary Hugging Face directory"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `rlkl COMMAND …` and return its exit code. Without a command: list them."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n")
        for name, (_, description) in COMMANDS.items():
            print(f"  rlkl {name:13s} {description}")
        print("\nrlkl COMMAND --help tells more.")
        return 0
    if argv[0] not in COMMANDS:
        advice = did_you_mean(argv[0], COMMANDS) or f"there is {', '.join(COMMANDS)}"
        print(f"error: no command {argv[0]!r}; {advice}", file=sys.stderr)
        return 2
    return exit_code(import_module(f"rlkl.cli.{COMMANDS[argv[0]][0]}").main, argv[1:])
