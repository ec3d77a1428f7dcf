"""What a run shows while it goes: the bar, a line every few steps, the table at the end; and how it is stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)

SHOWN = ("reward", "heldout/accuracy", "length", "entropy", "clip_fraction", "kl_old_pi", "kl_pi_ref_seq", "seconds")


def say(text: str) -> None:
    """A line of ours, in which brackets are no markup."""
    console.print(escape(text))


@contextmanager
def progress(done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; the caller says how many steps are done."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=total, completed=done)
        yield lambda steps: bar.update(task, completed=steps)


def show(step: int, row: dict[str, float], sample: dict) -> None:
    """One line of numbers, and one prompt with its reply and score."""
    names = dict.fromkeys([*SHOWN[:2], *(name for name in row if name.startswith("heldout/")), *SHOWN[2:]])
    say(f"step {step:5d}  " + "  ".join(f"{name} {row[name]:.3g}" for name in names if name in row))
    text = f"{sample['prompt']!r} → {sample['reply']!r}"
    console.print(f"  [dim]{escape(text[:200])}   score {sample['score']:g}[/]")


def suspect(step: int, suspicion: str) -> None:
    """One line that says why the reward may be hacked."""
    console.print(f"[yellow]reward hacking?[/] step {step}: {escape(suspicion)}: docs/hacking.md")


def before_and_after(before: dict[str, float], after: dict[str, float], title: str) -> None:
    table = Table("", "before", "after", title=escape(title), title_justify="left")
    for name in after:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
    console.print(table)


def usage(doc: str, options: list[tuple[str, str, str, str]], command: str = "train.py",
          names: str = "[CONFIG.yaml ...]") -> None:
    """Every option with its type, default and one line."""
    say(f"{doc}\nusage: {command} {names} [key=value ...]   later arguments win\n")
    table = Table("option", "type", "default", "", box=None, pad_edge=False)
    for row in options:
        table.add_row(*map(escape, row))
    console.print(table)


class Interrupt:
    """SIGINT and SIGTERM ask the loop to end after the step it is in; a second one ends it at once."""

    def __enter__(self) -> Interrupt:
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
