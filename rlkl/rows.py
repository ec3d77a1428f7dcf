"""Files of one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rlkl.errors import UserError


def json_rows(path: str, key: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) for each row of a JSONL file. UserError naming the line that is none."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{key}={path!r}: no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors put a mark before the first row
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path!r}: cannot be read as UTF-8: {error}") from error
    found = False
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a row
        if line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
            except (ValueError, RecursionError) as error:  # also a number of too many digits, too many brackets
                raise UserError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object but {str(row)[:40]!r}")
            found = True
            yield f"{path}:{number}", row
    if not found:
        raise UserError(f"{key}={path!r}: the file holds no rows")
