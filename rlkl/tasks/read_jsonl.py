"""Read JSONL: files of one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlkl.errors import UserError


def json_rows(path: str, key: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of each row of a JSONL file; blank lines are skipped.

    key: the option that names the file, for error messages. Raises UserError where the file is
    missing, empty or not UTF-8, and on the first line that is not a JSON object.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{key}={path!r}: no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")  # skips a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path!r}: cannot be read as UTF-8: {error}") from error
    is_empty = True
    # Not splitlines: U+2028 and U+0085 may stand inside a row.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            is_empty = False
            yield f"{path}:{number}", parse_object(line, f"{path}:{number}")
    if is_empty:
        raise UserError(f"{key}={path!r}: the file holds no rows")


def is_prompt(value: object) -> bool:
    """Is this text or a list of chat messages, and not empty?"""
    return isinstance(value, str | list) and bool(value)


def parse_object(line: str, where: str) -> dict[str, Any]:
    """One line as a JSON object. Raises UserError, which starts with `where`."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair cannot be encoded
    except (ValueError, RecursionError) as error:  # too many digits or brackets count too
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {str(row)[:40]!r}")
    return row
