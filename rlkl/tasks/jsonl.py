"""A file of {"prompt": …, "answer": …} rows, one JSON object a line; further keys go to Example.info."""

from __future__ import annotations

import json
import zlib

from rlkl.errors import UserError
from rlkl.rows import json_rows
from rlkl.tasks.listed import Listed
from rlkl.types import Example


class Jsonl(Listed):
    """Rows of `path`; about `heldout` of them are held out, by a hash of the prompt: equal prompts share a side."""

    def __init__(self, split: str, *, path: str, heldout: float = 0.1) -> None:
        examples = [parse(row, where) for where, row in json_rows(path, "task.path")]
        self.examples = [e for e in examples if (bucket(e.prompt) < heldout) == (split == "heldout")]
        if not self.examples:
            raise UserError(f"task.path={path!r}: no row falls on the {split} side with task.heldout={heldout}")

    def score(self, example: Example, reply: str) -> float:
        """1 if the reply is the answer, but for white space around it."""
        return float(reply.strip() == example.answer.strip())


def parse(row: dict, where: str) -> Example:
    """One row. Raises UserError naming the line."""
    if missing := [name for name in ("prompt", "answer") if name not in row]:
        raise UserError(f"{where}: the row has no {missing[0]!r}; it needs prompt and answer")
    prompt, answer = row.pop("prompt"), row.pop("answer")
    if not isinstance(prompt, str | list) or not prompt or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: prompt must be text or chat messages, answer text or a number")
    return Example(prompt, str(answer), row)


def bucket(prompt: str | list[dict]) -> float:
    """A number in [0, 1) that depends on the prompt alone."""
    return zlib.crc32(json.dumps(prompt, sort_keys=True).encode()) / 2**32
