"""Runs side by side: the options in which they differ, and their results.

With out=FOLDER the table is also written as a page, with a figure.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from rlkl.cli.run_commands import Run, find_run, help_printed, newest_state, parse
from rlkl.cli.schema import Report
from rlkl.errors import UserError
from rlkl.run import config, report
from rlkl.run import folder as run_folder
from rlkl.run.log import read_rows
from rlkl.run.terminal import console, log_line

USAGE = "RUN [RUN …]"
NOT_COMPARED = ("run", "resume", "log.", "checkpoint.")  # options that change no number


def main(argv: list[str]) -> None:
    if help_printed(argv, "report", USAGE, __doc__ or "", config.options(Report)):
        return
    paths, overrides = parse(argv, "report", USAGE)
    options = config.load(overrides, schema=Report)
    summaries = [summarise(find_run(path)) for path in paths]
    head, *body = report.comparison(summaries)
    table = Table(*map(escape, head))
    for row in body:
        table.add_row(*map(escape, row))
    console.print(table)
    if options.out is None:
        return
    folder = Path(options.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = report.compare(folder, summaries)
    except OSError as error:
        raise UserError(f"out={folder}: cannot be written: {error.strerror}") from error
    log_line(f"written: {' and '.join(map(str, written))}")


def summarise(run: Run) -> report.RunSummary:
    """The summary of a run, from the files in its folder. UserError where it has no step yet."""
    rows = read_rows(run.folder / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run.folder}: no step is done yet, there is nothing to compare")
    options = run_folder.flat(asdict(run.cfg))
    state = newest_state(run) or {}
    file = run.folder / "heldout.json"  # written at the end
    heldout = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    accuracies = [(row["eval/accuracy"], row["step"]) for row in rows if "eval/accuracy" in row]
    return report.RunSummary(
        name=str(run.folder),
        options={key: x for key, x in options.items() if not key.startswith(NOT_COMPARED)},
        rows=rows,
        before=heldout.get("before", state.get("before", {})),
        after=heldout.get("after", {}),
        best=max(accuracies, key=lambda pair: (pair[0], -pair[1]), default=None),
    )
