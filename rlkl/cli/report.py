"""Runs side by side: the options in which they differ, what came of it, and with out=FOLDER a figure and a page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from rlkl import config, report, runs
from rlkl.cli.finished import Run, asked_for_help, find, newest_state, parse
from rlkl.errors import UserError
from rlkl.log import read_rows
from rlkl.schema_runs import Report
from rlkl.terminal import console, say

NAMES = "RUN [RUN …]"
NEVER = ("run", "resume", "log.", "checkpoint.")  # differences that change no number


def main(argv: list[str]) -> None:
    """compare runs in one table and, with out=FOLDER, one figure"""
    if asked_for_help(argv, "report", NAMES, __doc__ or "", config.options({}, Report)):
        return
    paths, changes = parse(argv, "report", NAMES)
    how = config.load(changes, schema=Report)
    told = [told_by(find(path)) for path in paths]
    head, *body = report.together(told)
    table = Table(*map(escape, head))
    for row in body:
        table.add_row(*map(escape, row))
    console.print(table)
    if how.out is not None:
        folder = Path(how.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            report.compare(folder, told)
        except OSError as error:
            raise UserError(f"out={how.out}: cannot be written: {error.strerror}") from error
        say(f"written: {folder / 'report-compare.md'} and {folder / 'report-compare.png'}")


def told_by(run: Run) -> report.Told:
    """What the files of a run say. UserError where it has no step yet."""
    rows = read_rows(run.folder / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run.folder}: no step is done yet, there is nothing to compare")
    options = {k: v for k, v in runs.flat(asdict(run.cfg)).items() if not k.startswith(NEVER)}
    file, state = run.folder / "heldout.json", newest_state(run) or {}
    heldout = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    measured = [(row["heldout/accuracy"], row["step"]) for row in rows if "heldout/accuracy" in row]
    best = max(measured, key=lambda found: (found[0], -found[1]), default=None)
    return report.Told(str(run.folder), options, rows, heldout.get("before", state.get("before", {})),
                       heldout.get("after", {}), best)
