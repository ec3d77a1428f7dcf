"""What a run prints: progress bar, a line every few steps, a table at the end; and its signals."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)

SHOWN = (
    "reward",
    "eval/accuracy",
    "response_length",
    "entropy",
    "clip_fraction",
    "kl_old_pi",
    "kl_pi_ref_sequence",
    "seconds",
)


def log_line(text: str) -> None:
    """Print a line in which square brackets are not markup."""
    console.print(escape(text))


def note(text: str) -> None:
    """Print something that the user should know, though the run goes on."""
    console.print(f"[yellow]note:[/] {escape(text)}")


@contextmanager
def progress(done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left. Yields a function that is told how many steps are done."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=total, completed=done)
        yield lambda steps: bar.update(task, completed=steps)


def log_step(step: int, metrics: dict[str, float], sample: dict[str, Any]) -> None:
    """Print one line of metrics, and one prompt with its response and score."""
    heldout = [name for name in metrics if name.startswith("eval/")]
    names = dict.fromkeys([*SHOWN[:2], *heldout, *SHOWN[2:]])
    numbers = "  ".join(f"{name} {metrics[name]:.3g}" for name in names if name in metrics)
    log_line(f"step {step:5d}  {numbers}")
    text = f"{sample['prompt']!r} → {sample['response']!r}"
    console.print(f"  [dim]{escape(text[:200])}   score {sample['score']:g}[/]")


def log_reward_hacking(step: int, suspicion: str) -> None:
    """Print why the reward may be hacked."""
    console.print(f"[yellow]reward hacking?[/] step {step}: {escape(suspicion)}: docs/hacking.md")


def log_before_after(before: dict[str, float], after: dict[str, float], title: str) -> None:
    """Print a table of held-out numbers."""
    table = Table("", "before", "after", title=escape(title), title_justify="left")
    for name in after:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
    console.print(table)


def print_help(
    doc: str,
    options: Sequence[tuple[str, str, str, str]],
    command: str = "train.py",
    names: str = "[CONFIG.yaml ...]",
) -> None:
    """Print a command's --help: every option with its type, default and description."""
    log_line(f"{doc}\nusage: {command} {names} [key=value ...]   later arguments win\n")
    table = Table("option", "type", "default", "", box=None, pad_edge=False)
    for row in options:
        table.add_row(*map(escape, row))
    console.print(table)


class Interrupt:
    """SIGINT and SIGTERM ask the loop to end after its current step; a second one ends it now."""

    def __enter__(self) -> Interrupt:
        self.asked = False
        self.before = {
            number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
