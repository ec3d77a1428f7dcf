"""A file of {"prompt": …, "answer": …} rows, one JSON object a line; further keys go to Example.info."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from rlkl.errors import UserError
from rlkl.tasks.listed import Listed
from rlkl.types import Example


class Jsonl(Listed):
    """Rows of `path`; about `heldout` of them are held out, by a hash of the prompt: equal prompts share a side."""

    def __init__(self, split: str, *, path: str, heldout: float = 0.1) -> None:
        file = Path(path)
        if not file.is_file():
            raise UserError(f"task.path={path!r}: no such file")
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand in a row
        examples = [parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not examples:
            raise UserError(f"task.path={path!r}: the file holds no rows")
        self.examples = [e for e in examples if (bucket(e.prompt) < heldout) == (split == "heldout")]
        if not self.examples:
            raise UserError(f"task.path={path!r}: no row falls on the {split} side with task.heldout={heldout}")

    def score(self, example: Example, reply: str) -> float:
        """1 if the reply is the answer, but for white space around it."""
        return float(reply.strip() == example.answer.strip())


def parse(line: str, where: str) -> Example:
    """One row. Raises UserError naming the line."""
    try:
        row = json.loads(line)
        prompt, answer = row.pop("prompt"), row.pop("answer")
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: not a JSON object ({error})") from error
    except KeyError as error:
        raise UserError(f"{where}: the row has no {error}; it needs prompt and answer") from error
    if not isinstance(prompt, str | list) or not prompt or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: prompt must be text or chat messages, answer text or a number")
    return Example(prompt, str(answer), row)


def bucket(prompt: str | list[dict]) -> float:
    """A number in [0, 1) that depends on the prompt alone."""
    return zlib.crc32(json.dumps(prompt, sort_keys=True).encode()) / 2**32
