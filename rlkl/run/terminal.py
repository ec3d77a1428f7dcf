"""What a run prints: progress bars, a row every few steps, a table at the end; and its signals."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from types import FrameType, TracebackType
from typing import Any, NamedTuple

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

FEW = 30  # held-out prompts, rows or pairs; with as many the standard error is at most 0.09

# One display for all bars: one that is opened while another is shown is a line below it.
bars = Progress(
    TextColumn("{task.description}"),
    BarColumn(bar_width=None),  # what the numbers leave of the line
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
    console=console,
    expand=True,
    transient=True,
    speed_estimate_period=math.inf,  # by default 30 s, in which a large model does not do a step
)


class Column(NamedTuple):
    """A column of the table of steps."""

    title: str
    metric: str
    width: int = 8  # characters, with the space before it
    percent: bool = False


COLUMNS = (  # the most important ones first: a narrow terminal shows as many as it has room for
    Column("reward", "reward"),
    Column("zero_std", "frac_reward_zero_std", 9, percent=True),
    Column("expl_var", "explained_variance", 9, percent=True),
    Column("length", "response_length"),
    Column("entropy", "entropy"),
    Column("clipped", "clip_fraction", percent=True),
    Column("grad", "grad_norm/policy"),
    Column("kl_old", "kl_old_pi"),
    Column("kl_ref", "kl_pi_ref_sequence"),
    Column("sec", "seconds", 7),
)
LEGEND = {  # title of a column that needs one → what it is; docs/metrics.md has them all
    "zero_std": "share of prompts whose responses all score the same: no signal",
    "expl_var": "share of the variance of the returns that the critic explains",
    "kl_old": "KL(pi_old || pi) per token; pi_old is the policy that sampled",
    "kl_ref": "KL(pi || ref) per response; ref is the frozen model of the start",
}
STEP_WIDTH = 5
ROWS_PER_HEAD = 10


def log_line(text: str) -> None:
    """Print a line in which square brackets are not markup."""
    console.print(escape(text))


def note(text: str) -> None:
    """Print something that the user should know, though the run goes on."""
    console.print(f"[yellow]note:[/] {escape(text)}")


def print_words(markup: str) -> None:
    """Print a text that a terminal breaks between words; in a file it is one line."""
    console.print(markup, soft_wrap=not console.is_terminal)


def note_few_heldout(count: int, kind: str, advice: str) -> None:
    """Say how rough a held-out number is, where it is a mean over fewer than FEW prompts or pairs.

    The standard error of an accuracy is sqrt(p (1 - p) / count), at most half of 1 / sqrt(count).
    """
    if count < FEW:
        error = 0.5 / math.sqrt(count)
        note(
            f"held-out {kind}: only {count}, so a mean over them is rough: the standard error of "
            f"an accuracy is up to {error:.2f}; {advice}"
        )


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, if this is a terminal. Yields a function that is told what is done.

    It disappears at the end: what should stay is printed as a line.
    """
    outermost = console.is_terminal and not bars.live.is_started
    task = bars.add_task(title, total=total, completed=done)
    if outermost:
        bars.start()
    try:
        yield lambda count: bars.update(task, completed=count)
    finally:
        if outermost:
            bars.stop()
        bars.remove_task(task)


class StepTable:
    """Prints metrics of steps as rows under a head, which comes again every few rows.

    The columns are the metrics that the run has computed so far; one that a step does not have is
    `-`. A new one, such as the gradient norm of the policy after the critic's warm-up, prints the
    head again. Where there is a critic, groups of equal scores teach too, and it is the explained
    variance that is shown.
    """

    def __init__(self) -> None:
        self.columns: list[Column] = []
        self.computed: set[str] = set()  # metrics
        self.explained: set[str] = set()  # titles in a legend that was printed
        self.rows = 0  # since the last head

    def print(self, step: int, metrics: dict[str, float]) -> None:
        """Print the row of a step."""
        self.computed |= metrics.keys()
        columns = [column for column in COLUMNS if column.metric in self.computed]
        if "explained_variance" in self.computed:
            columns = [column for column in columns if column.metric != "frac_reward_zero_std"]
        columns = fitting(columns)
        if columns != self.columns or self.rows == ROWS_PER_HEAD:
            self.columns = columns
            self.print_head()
        cells = [f"{cell(metrics.get(c.metric), c.percent):>{c.width}}" for c in columns]
        log_line(f"{step:{STEP_WIDTH}d}{''.join(cells)}")
        self.rows += 1

    def print_head(self) -> None:
        """Print the titles, and before them what those mean that have not been explained."""
        for title in [column.title for column in self.columns]:
            if title in LEGEND and title not in self.explained:
                self.explained.add(title)
                print_words(f"[dim]{title:8}  {escape(LEGEND[title])}[/]")
        titles = [f"{column.title:>{column.width}}" for column in self.columns]
        console.print(f"[bold]{'step':>{STEP_WIDTH}}{''.join(titles)}[/]")
        self.rows = 0


def fitting(columns: list[Column]) -> list[Column]:
    """The first columns, as many as a line of the terminal has room for; all in a file."""
    if not console.is_terminal:
        return columns
    ends = accumulate((column.width for column in columns), initial=STEP_WIDTH)
    return [
        column for column, end in zip(columns, list(ends)[1:], strict=True) if end <= console.width
    ]


def cell(x: float | None, percent: bool = False) -> str:
    """A number in at most seven characters, with three digits if possible; a share in percent.

    `-` where there is none.
    """
    if x is None:
        return "-"
    if percent:
        return f"{100 * x:.1f}%"
    if 100 <= abs(x) < 1e6:
        return f"{x:.0f}"
    texts = f"{x:#.3g}", f"{x:#.2g}", f"{x:.1g}"
    return next((text for text in texts if len(text) <= 7), texts[-1])


def log_sample(sample: dict[str, Any]) -> None:
    """Print a prompt with its response and score, in one line of the terminal."""
    score = "none" if sample["score"] is None else f"{sample['score']:.3g}"
    prompt, response = repr(sample["prompt"]), repr(sample["response"])
    room = console.width - STEP_WIDTH - len(f"   →   score {score}")
    prompt = shorten(prompt, max(room // 2, room - len(response)))
    response = shorten(response, room - len(prompt))
    indent = " " * (STEP_WIDTH + 1)
    console.print(f"{indent}[dim]{escape(f'{prompt} → {response}  score {score}')}[/]")


def shorten(text: str, width: int) -> str:
    """The text, or its beginning and its end where it has more than `width` characters."""
    if len(text) <= width:
        return text
    if width < 4:
        return text[: max(width, 0)]
    start = (width - 3) // 2
    return f"{text[:start]} … {text[len(text) - (width - 3 - start) :]}"


def log_heldout(when: str, numbers: dict[str, float]) -> None:
    """Print held-out numbers in one line."""
    words = [f"{name} {x:.3f}" for name, x in numbers.items()]
    print_words(escape(f"held out, {when}: {', '.join(words)}"))


def log_reward_hacking(step: int, suspicion: str) -> None:
    """Print why the reward may be hacked."""
    console.print(f"[yellow]reward hacking?[/] step {step}: {escape(suspicion)}: docs/hacking.md")


def log_before_after(before: dict[str, float], after: dict[str, float], title: str) -> None:
    """Print a table of held-out numbers."""
    table = Table("", "before", "after", title=escape(title), title_justify="left")
    for name in after:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
    console.print(table)


def print_help(text: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a text, then rows of a name, which is never cut, and what it is, wrapped."""
    if text:
        print_words(escape(text))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(escape(name), escape(text))
    console.print(table, soft_wrap=False)


class Interrupt:
    """SIGINT and SIGTERM ask the loop to end after its current step; a second one ends it now.

    Python delivers signals to its main thread; a run in another one does not listen to them.
    """

    def __enter__(self) -> Interrupt:
        self.asked = False
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        self.before = {number: signal.signal(number, self.ask) for number in numbers}
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
